"""Chat messages with pictures and videos to model inputs for Eagle 2.5.

Self-contained: shipped inside every exported checkpoint and loaded with `trust_remote_code`
(transformers 4.51 to 5.x). Three steps, as in the model card's Quick Start:

    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos, video_kwargs = processor.process_vision_info(messages, return_video_kwargs=True)
    inputs = processor(text=[text], images=images, videos=videos, videos_kwargs=video_kwargs,
                       return_tensors="pt")

The written prompt equals the `hf` template variant of training, token by token.
"""

import base64
import bisect
import io
import os
import re
import urllib.request
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, UnidentifiedImageError
from transformers import BatchFeature, ProcessorMixin

from .clips import choose_frames, clip_bounds, shown_seconds, uneven_times
from .pictures import open_picture, to_rgb
from .prompt import (
    CHAT_TEMPLATE,
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    frame_label,
    image_label,
    video_label,
)

DEFAULT_FPS = 2.0
DEFAULT_MIN_FRAMES = 4
DEFAULT_MAX_FRAMES = 256
FRAME_MULTIPLE = 2  # sampled frame counts are even, as in the released processor

_PLACEHOLDER = re.compile(r"<(image|video)-(\d+)>")
# Put into special tokens that a user typed, so that they stay text: a Unicode noncharacter.
_SHIELD = "\ufdd0"


class VideoFrames(list[Any]):
    """Frames of one video (PIL RGB) with `fps` as sampled and `timestamps` in seconds, one per frame."""

    def __init__(self, frames: Iterable[Any], fps: float, timestamps: list[float]) -> None:
        super().__init__(frames)
        self.fps = fps
        self.timestamps = timestamps


def load_image(source: Any) -> Image.Image:
    """RGB picture from a PIL image, a path, `file://`, `http(s)://` or a `data:image/...;base64,` URL.

    Raises:
        ValueError: the picture is missing or cannot be decoded; the message names it.
    """
    if isinstance(source, Image.Image):
        return to_rgb(source)
    name = str(source) if len(str(source)) < 200 else str(source)[:80] + "..."
    stream: Any
    try:
        if str(source).startswith("data:image"):
            stream = io.BytesIO(base64.b64decode(str(source).split("base64,", 1)[1]))
        elif str(source).startswith(("http://", "https://")):
            stream = io.BytesIO(_download(str(source)))
        else:
            stream = str(source).removeprefix("file://")
        with open_picture(stream) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise ValueError(f"image not found: {name}") from None
    except (OSError, UnidentifiedImageError, SyntaxError, IndexError, Image.DecompressionBombError) as error:
        raise ValueError(f"image cannot be read: {name} ({error})") from None


def _download(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as response:
        return bytes(response.read())


def frame_count(
    available: int,
    duration: float,
    fps: float | None = None,
    nframes: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
) -> int:
    """Frames to take of a video with `available` frames over `duration` seconds: an even number.

    Either `nframes`, or `fps` (2 by default) between `min_frames` (4) and `max_frames` (256).
    """
    if fps is not None and nframes is not None:
        raise ValueError("give a video either fps or nframes, not both")
    wanted: float
    if nframes is not None:
        wanted = round(nframes / FRAME_MULTIPLE) * FRAME_MULTIPLE
    else:
        low = DEFAULT_MIN_FRAMES if min_frames is None else min_frames
        high = DEFAULT_MAX_FRAMES if max_frames is None else max_frames
        low = -(-low // FRAME_MULTIPLE) * FRAME_MULTIPLE
        wanted = min(max(duration * (DEFAULT_FPS if fps is None else fps), low), high)
    wanted = int(min(wanted, available)) // FRAME_MULTIPLE * FRAME_MULTIPLE
    return max(wanted, min(FRAME_MULTIPLE, available))


def load_video(
    source: Any, video_start: float | None = None, video_end: float | None = None, **sampling: Any
) -> VideoFrames:
    """Exact frames of a video file, in presentation order, by PyAV.

    Args:
        source: path, `file://` or `http(s)://` URL.
        video_start, video_end: clip in seconds; frames with start <= t < end are used.
        sampling: `fps`, `nframes`, `min_frames`, `max_frames`, see `frame_count`.

    Returns:
        Frames at `linspace(first, last, n).round()`, or where the rate varies those nearest to evenly
        spaced times; `fps` is n over the clip's duration.

    Raises:
        ValueError: the video is missing, unreadable, or has no frame in the clip; the message names it.
    """
    import av  # only videos need it

    name = str(source)
    if name.startswith(("http://", "https://")):
        try:
            data = _download(name)
        except OSError as error:
            raise ValueError(f"video cannot be read: {name} ({error})") from None
    else:
        name = name.removeprefix("file://")
        if not os.path.isfile(name):
            raise ValueError(f"video not found: {name}")
        data = None

    def opened() -> Any:
        # Titles and the like may be in any encoding: they are not worth failing for.
        return av.open(name if data is None else io.BytesIO(data), metadata_errors="replace")

    try:
        stamps, keyframes, unit, last_duration = _frame_table(opened)
        if not stamps:
            raise ValueError(f"video has no frames: {name}")
        times = [stamp * unit for stamp in stamps]
        end = times[0] + shown_seconds(len(times), times[-1] - times[0], last_duration * unit)
        asked = [None if t is None else Fraction(str(t)) for t in (video_start, video_end)]
        start, stop = clip_bounds(times[0], end, *asked)
        inside = [i for i, t in enumerate(times) if start <= t and (video_end is None or t < stop)]
        if not inside:
            begin, until = (t if own is None else own for own, t in zip(asked, (start, stop), strict=True))
            raise ValueError(f"video has no frame between {float(begin):g} s and {float(until):g} s: {name}")
        duration = stop - start
        n = frame_count(len(inside), float(duration), **sampling)
        first, last = inside[0], inside[-1]
        wanted = choose_frames(first, last, n, uneven_times(stamps[first : last + 1]))
        frames = _decode(opened, [stamps[i] for i in wanted], keyframes)
    except av.error.FFmpegError as error:
        raise ValueError(f"video cannot be read: {name} ({error.strerror})") from None
    return VideoFrames(
        [frames[stamps[i]] for i in wanted], float(n / duration), [float(times[i]) for i in wanted]
    )


class Eagle2_5_VLProcessor(ProcessorMixin):
    """Tokenizer and image processor in one; writes the image tokens that the model fills.

    Args:
        image_processor: `Eagle2_5_VLImageProcessor`.
        tokenizer: any tokenizer with `<img>`, `</img>` and `<IMG_CONTEXT>` as single tokens.
        chat_template: Jinja template; the one of this file when None.
        tokens_per_tile: visual tokens of one tile (256 for 448 pixels and patch 14).
    """

    if int(transformers.__version__.split(".")[0]) < 5:  # 5.x reads the signature of __init__ instead
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"
        valid_kwargs = ["chat_template", "tokens_per_tile"]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        tokens_per_tile: int = 256,
    ) -> None:
        chat_template = chat_template or CHAT_TEMPLATE
        # transformers' has no types
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]
        self.tokens_per_tile = tokens_per_tile
        self.image_token, self.image_start_token, self.image_end_token = IMG_CONTEXT, IMG_START, IMG_END
        vocabulary = tokenizer.get_vocab()
        for token in (self.image_token, self.image_start_token, self.image_end_token):
            if token not in vocabulary:
                raise ValueError(f"the tokenizer has no token {token}: it is not an Eagle 2.5 tokenizer")
        tokenizer.padding_side = "left"  # batches are for generation: every row ends where the answer starts

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, "pixel_values", "image_sizes"]

    def apply_chat_template(  # type: ignore[override]  # the tokenizer's names, and its defaults
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        return_tensors: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The prompt of one conversation (or a list of them), with `<image-k>` and `<video-k>` placeholders.

        Special tokens typed in a message, and media names in an answer, are shielded and stay text. With
        `tokenize=True` the media are loaded too, and the ids, or with `return_dict=True` all model inputs,
        are returned.
        """
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        texts = [
            self.tokenizer.apply_chat_template(
                self._shielded(one),
                chat_template=chat_template or self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
            for one in (conversation if batched else [conversation])
        ]
        if not tokenize:
            return texts if batched else texts[0]
        images, videos = self.process_vision_info(conversation)
        inputs = self(
            text=texts, images=images, videos=videos, padding=batched, return_tensors=return_tensors
        )
        if return_dict:
            return inputs
        return inputs["input_ids"] if batched or return_tensors else inputs["input_ids"][0]

    def process_vision_info(self, conversations: Any, return_video_kwargs: bool = False) -> Any:
        """Load every picture and video of one conversation or a list of them, in reading order.

        An item carries `image` / `image_url` / `video`: a path, a URL, a PIL image, or for a video also a
        list of pictures; videos take `fps` or `nframes`, `min_frames`, `max_frames`, `video_start`,
        `video_end`.

        Returns:
            (images or None, videos or None) and, if asked for, `{"fps": [...], "timestamps": [[...], ...]}`.
        """
        images, videos = [], []
        batched = bool(conversations) and not isinstance(conversations[0], dict)
        for message in (m for one in (conversations if batched else [conversations]) for m in one):
            for item in message["content"] if isinstance(message["content"], list) else []:
                if "image" in item or "image_url" in item:
                    source = item["image"] if "image" in item else item["image_url"]
                    images.append(load_image(source["url"] if isinstance(source, dict) else source))
                elif "video" in item:
                    videos.append(_video_of(item))
        result = (images or None, videos or None)
        if not return_video_kwargs:
            return result
        return *result, {"fps": [v.fps for v in videos], "timestamps": [v.timestamps for v in videos]}

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        images_kwargs: dict[str, Any] | None = None,
        videos_kwargs: dict[str, Any] | None = None,
        return_tensors: Any = None,
        padding: Any = False,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs for prompts written by `apply_chat_template`.

        Args:
            images, videos: what `process_vision_info` returned, over all prompts in order.
            text: prompt or list of prompts; `<image-k>` is the prompt's own k-th picture.
            images_kwargs: `min_dynamic_tiles`, `max_dynamic_tiles`, `use_thumbnail`.
            videos_kwargs: `fps` and `timestamps` per video; default: what the loaded videos carry.
                `max_dynamic_tiles`: cut frames as pictures are; default: a frame is one tile.

        Returns:
            `input_ids`, `attention_mask` [b, s]; with media `pixel_values` [n, 3, S, S] and `image_sizes`.

        Raises:
            ValueError: prompts and media do not match; truncation (it would cut image tokens).
        """
        if text is None:
            raise ValueError("the processor needs text: write the prompt with apply_chat_template")
        tiling, videos_kwargs = dict(images_kwargs or {}), dict(videos_kwargs or {})
        frame_tiles = videos_kwargs.pop("max_dynamic_tiles", None)
        if kwargs.pop("truncation", None):
            raise ValueError("truncation would cut image tokens: use fewer frames or tiles instead")
        if kwargs:
            raise TypeError(f"the processor does not know {', '.join(sorted(kwargs))}")
        texts = [text] if isinstance(text, str) else list(text)
        images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        videos = _with_metadata([] if videos is None else videos, videos_kwargs)
        media = _Media(self, images, videos, tiling, frame_tiles)
        rows = [self._encode(media.expand(one)) for one in texts]
        media.check_all_used()
        padded = {"padding": padding, "max_length": max_length, "pad_to_multiple_of": pad_to_multiple_of}
        # transformers 4 advises to pad while tokenizing, which rows of ids cannot.
        getattr(self.tokenizer, "deprecation_warnings", {})["Asking-to-pad-a-fast-tokenizer"] = True
        data = dict(self.tokenizer.pad({"input_ids": rows}, **padded))
        return BatchFeature({**data, **media.tensors()}, tensor_type=return_tensors)

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's `decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def _special_tokens(self) -> re.Pattern[str]:
        tokens = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def _shielded(self, conversation: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """A copy in which typed special tokens, and media names outside the user's turns, stay text."""
        special = self._special_tokens()

        def shield(text: str, role: str) -> str:
            text = text.replace(_SHIELD, "")
            for pattern in (special,) if role == "user" else (special, _PLACEHOLDER):
                text = pattern.sub(lambda match: match.group()[0] + _SHIELD + match.group()[1:], text)
            return text

        result = []
        for message in conversation:
            role, content = message["role"], message["content"]
            if isinstance(content, str):
                content = shield(content, role)
            else:
                content = [
                    {**item, "text": shield(item["text"], role)} if "text" in item else item
                    for item in content
                ]
            result.append({**message, "content": content})
        return result

    def _encode(self, text: str) -> list[int]:
        if _SHIELD not in text:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids: list[int] = []
        end = 0
        special = self._special_tokens()
        for match in [*special.finditer(text), None]:
            run = text[end : match.start() if match else len(text)].replace(_SHIELD, "")
            if run:
                ids += self.tokenizer(run, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if match:
                ids.append(self.tokenizer.convert_tokens_to_ids(match.group()))
                end = match.end()
        return ids


class _Media:
    """Pictures and videos of a batch, consumed prompt by prompt; collects tiles in reading order."""

    def __init__(
        self,
        processor: "Eagle2_5_VLProcessor",
        images: Iterable[Any],
        videos: Iterable[VideoFrames],
        tiling: dict[str, Any],
        frame_tiles: int | None,
    ) -> None:
        self.processor, self.tiling, self.frame_tiles = processor, tiling, frame_tiles
        self.media: dict[str, list[Any]] = {"image": list(images), "video": list(videos)}
        self.used = {"image": 0, "video": 0}  # by the prompts before the current one
        self.tiles: list[torch.Tensor] = []
        self.sizes: list[torch.Tensor] = []

    def expand(self, text: str) -> str:
        """`text` with each placeholder replaced by labels and image tokens."""
        seen: dict[str, set[int]] = {"image": set(), "video": set()}

        def written(match: re.Match[str]) -> str:
            kind, number = match.group(1), int(match.group(2))
            left = len(self.media[kind]) - self.used[kind]
            if not 1 <= number <= left:
                raise ValueError(f"the prompt asks for {match.group()}, there are {left} {kind}s for it")
            if number in seen[kind]:
                raise ValueError(f"the prompt uses {match.group()} twice")
            seen[kind].add(number)
            item = self.media[kind][self.used[kind] + number - 1]
            return self._image(item, number) if kind == "image" else self._video(item, number)

        text = _PLACEHOLDER.sub(written, text)
        for kind, numbers in seen.items():
            if numbers != set(range(1, len(numbers) + 1)):
                raise ValueError(
                    f"the prompt's {kind}s are numbered {sorted(numbers)}: number them 1, 2, ..."
                )
            self.used[kind] += len(numbers)
        return text

    def _tokens(self, n_tiles: int) -> str:
        p = self.processor
        return f"{p.image_start_token}{p.image_token * (n_tiles * p.tokens_per_tile)}{p.image_end_token}"

    def _image(self, image: Any, number: int) -> str:
        data = self.processor.image_processor(images=[image], **self.tiling)
        self.tiles.append(data["pixel_values"])
        self.sizes.append(data["image_sizes"])
        return f"{image_label(number)}{self._tokens(len(data['pixel_values']))}"

    def _video(self, video: VideoFrames, number: int) -> str:
        if self.frame_tiles is None:
            data = self.processor.image_processor(videos=[video])
            counts = [1] * len(video)
        else:
            data = self.processor.image_processor(images=list(video), max_dynamic_tiles=self.frame_tiles)
            counts = data["num_tiles"].tolist()
        self.tiles.append(data["pixel_values"])
        self.sizes.append(data["image_sizes"])
        frames = "".join(
            f"{frame_label(i, t)}{self._tokens(n)}"
            for i, (t, n) in enumerate(zip(video.timestamps, counts, strict=True), start=1)
        )
        return video_label(number, video.fps) + frames

    def check_all_used(self) -> None:
        for kind, items in self.media.items():
            if self.used[kind] != len(items):
                raise ValueError(f"{len(items)} {kind}s were given and the prompts use {self.used[kind]}")

    def tensors(self) -> dict[str, Any]:
        if not self.tiles:
            return {}
        return {"pixel_values": torch.cat(self.tiles), "image_sizes": torch.cat(self.sizes)}


def _video_of(item: dict[str, Any]) -> VideoFrames:
    source = item["video"]
    names = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")
    options = {name: item[name] for name in names if item.get(name) is not None}
    if not isinstance(source, (list, tuple)):
        return load_video(source, **options)
    if not source:
        raise ValueError("a video given as a list of pictures is empty")
    fps = float(options.get("fps", DEFAULT_FPS))  # of the list as it is: nothing is sampled
    return VideoFrames([load_image(frame) for frame in source], fps, [i / fps for i in range(len(source))])


def _with_metadata(videos: Iterable[Any], kwargs: dict[str, Any]) -> list[VideoFrames]:
    """Frame lists as `VideoFrames`; `fps` and `timestamps` of `videos_kwargs` win over what they carry."""
    result = []
    for i, video in enumerate(videos):
        given = {name: kwargs[name][i] for name in ("fps", "timestamps") if kwargs.get(name)}
        fps = given.get("fps", getattr(video, "fps", DEFAULT_FPS))
        default = getattr(video, "timestamps", [k / fps for k in range(len(video))])
        times = given.get("timestamps", default)
        if len(times) != len(video):
            raise ValueError(f"video {i + 1} has {len(video)} frames and {len(times)} timestamps")
        result.append(VideoFrames(video, fps, times))
    return result


def _frame_table(opened: Callable[[], Any]) -> tuple[list[int], list[int], Fraction, int]:
    """Presentation times of the shown frames and of the key frames, their unit in seconds, and the duration
    of the last packet in it (0: unknown).

    From the packets, without decoding: a container's own counts and rates are wrong on edit lists, variable
    frame rates and damaged files.
    """
    with opened() as container:
        if not container.streams.video:
            return [], [], Fraction(1), 0
        stream = container.streams.video[0]
        packets = [p for p in container.demux(stream) if p.size and p.pts is not None]
        shown = {p.pts: p.duration or 0 for p in packets if not (p.is_discard or p.is_corrupt)}
        keyframes = sorted({p.pts for p in packets if p.is_keyframe})
        return sorted(shown), keyframes, stream.time_base, shown[max(shown)] if shown else 0


def _decode(opened: Callable[[], Any], wanted: list[int], keyframes: list[int]) -> dict[int, Image.Image]:
    """Upright RGB frames by presentation time; seeks from key frame to key frame.

    Where seeking misses (MPEG-TS, damaged indexes) everything is read from the start.
    """
    import av

    try:
        return _decode_from(opened, wanted, keyframes)
    except (_Missed, av.error.InvalidDataError):
        pass
    try:
        return _decode_from(opened, wanted, None)
    except _Missed as missed:
        raise ValueError(f"the frame at {missed} cannot be decoded: is the video damaged?") from None


class _Missed(Exception):
    """A wanted frame did not come out; a neighbour is no substitute."""


def _decode_from(
    opened: Callable[[], Any], wanted: list[int], keyframes: list[int] | None
) -> dict[int, Image.Image]:
    result: dict[int, Image.Image] = {}
    position = None
    with opened() as container:
        stream = container.streams.video[0]
        frames = container.decode(stream)
        for pts in sorted(set(wanted)):
            if keyframes:
                key = keyframes[max(bisect.bisect_right(keyframes, pts) - 1, 0)]
                if position is None or key > position:
                    container.seek(key, stream=stream, backward=True, any_frame=False)
                    frames = container.decode(stream)
            frame = next((f for f in frames if f.pts is not None and f.pts >= pts), None)
            if frame is None or frame.pts != pts or frame.is_corrupt:
                raise _Missed(f"{float(pts * stream.time_base):.2f} s")
            position = pts
            turns = round(getattr(frame, "rotation", 0) / 90)
            result[pts] = Image.fromarray(
                np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
            )
    return result
