"""Chat messages with pictures and videos to model inputs for Eagle 2.5.

Self-contained: shipped inside every exported checkpoint and loaded with `trust_remote_code`
(transformers 4.51 to 5.x). Three steps, as in the model card's Quick Start:

    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images, videos, video_kwargs = processor.process_vision_info(messages, return_video_kwargs=True)
    inputs = processor(text=[text], images=images, videos=videos, videos_kwargs=video_kwargs,
                       return_tensors="pt")

The written prompt equals the `hf` template variant of training, token by token.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import transformers
from transformers import BatchFeature, ProcessorMixin

from .clips import clip_bounds  # noqa: F401  # transformers 4.51 copies the files that this one names
from .content import read_conversation
from .grids import select_grid  # noqa: F401  # as clips
from .media_files import DEFAULT_FPS, DEFAULT_MAX_FRAMES, VideoFrames, load_image, video_of_part
from .pictures import to_rgb  # noqa: F401  # as clips
from .prompt import (
    IMG_CONTEXT,
    IMG_END,
    IMG_START,
    PromptMedium,
    thinks,
)
from .prompt import chat_template as own_template
from .room import Fitted, fit, prompt_room
from .subtitles import Subtitle, between_frames

_PLACEHOLDER = re.compile(r"<(image|video)-(\d+)>")
_TILING = ("min_dynamic_tiles", "max_dynamic_tiles", "use_thumbnail")
# Put into special tokens that a user typed, so that they stay text: a Unicode noncharacter.
_SHIELD = "\ufdd0"


class Eagle2_5_VLProcessor(ProcessorMixin):
    """Tokenizer and image processor in one; writes the image tokens that the model fills.

    Args:
        image_processor: `Eagle2_5_VLImageProcessor`.
        tokenizer: any tokenizer with `<img>`, `</img>` and `<IMG_CONTEXT>` as single tokens.
        chat_template: Jinja template; the one of this file when None.
        tokens_per_tile: visual tokens of one tile (256 for 448 pixels and patch 14).
        max_frames: of a video that does not say how many.
    """

    takes_subtitles = True  # exports of before leave them out without a word

    if int(transformers.__version__.split(".")[0]) < 5:  # 5.x reads the signature of __init__ instead
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"
        valid_kwargs = ["chat_template", "tokens_per_tile", "max_frames"]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        tokens_per_tile: int = 256,
        max_frames: int = DEFAULT_MAX_FRAMES,
    ) -> None:
        vocabulary = tokenizer.get_vocab()
        chat_template = chat_template or own_template(thinks=thinks(vocabulary))
        # transformers' has no types
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]
        self.tokens_per_tile, self.max_frames = tokens_per_tile, max_frames
        self.image_token, self.image_start_token, self.image_end_token = IMG_CONTEXT, IMG_START, IMG_END
        for token in (self.image_token, self.image_start_token, self.image_end_token):
            if token not in vocabulary:
                raise ValueError(f"the tokenizer has no token {token}: it is not an Eagle 2.5 tokenizer")
        if tokenizer.init_kwargs.get("padding_side") is None:  # neither the checkpoint nor the user says so
            tokenizer.padding_side = "left"  # for generation: every row ends where the answer starts

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
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The prompt of one conversation (or a list of them), with `<image-k>` and `<video-k>` placeholders.

        Special tokens typed in a message, and media names in an answer, are shielded and stay text. With
        `tokenize=True` the media are loaded too, and the ids, or with `return_dict=True` all model inputs,
        are returned; `processor_kwargs` are then those of `__call__`.
        """
        batched = _is_batch(conversation)
        conversations = [read_conversation(one) for one in (conversation if batched else [conversation])]
        texts = [
            self.tokenizer.apply_chat_template(
                self._shielded(one),
                chat_template=chat_template or self.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
            for one in conversations
        ]
        if not tokenize:
            return texts if batched else texts[0]
        images, videos = self.process_vision_info(conversations)
        options = {"padding": batched, "return_tensors": return_tensors, **(processor_kwargs or {})}
        inputs = self(text=texts, images=images, videos=videos, **options)
        if return_dict:
            return inputs
        return inputs["input_ids"] if batched or return_tensors else inputs["input_ids"][0]

    def process_vision_info(
        self, conversations: Any, return_video_kwargs: bool = False, read: bool = True
    ) -> Any:
        """Load every picture and video of one conversation or a list of them, in reading order.

        A part carries `image` or `video`, or in its place `image_url`, `video_url`, `url`, `path` or
        `base64`: a path, a URL, a PIL image, or for a video also a list of pictures. Videos take `fps` or
        `nframes`, `min_frames`, `max_frames`, `video_start`, `video_end`, and `subtitles` that are written
        between the frames: `[[start, end, text], ...]` in seconds (`subtitles.between_frames`).

        Args:
            read: False gives for each medium what reads it. `__call__` takes that too, and has the pixels of
                one medium at a time in memory, besides tiles.

        Returns:
            (images or None, videos or None) and, if asked for, `{"fps": [...], "timestamps": [[...], ...]}`.
        """
        images: list[Any] = []
        videos: list[Any] = []
        for one in conversations if _is_batch(conversations) else [conversations]:
            for message in read_conversation(one):
                for part in message["content"] if isinstance(message["content"], list) else []:
                    if part.get("image") is not None:
                        images.append(partial(load_image, part["image"]))
                    elif part.get("video") is not None:
                        videos.append(partial(video_of_part, part, self.max_frames))
        if read or return_video_kwargs:
            images, videos = [own() for own in images], [own() for own in videos]
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
        padding_side: str | None = None,
        add_special_tokens: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs for prompts written by `apply_chat_template`.

        Args:
            images, videos: what `process_vision_info` returned, over all prompts in order; pictures may also
                come as a list for each prompt.
            text: prompt or list of prompts; `<image-k>` is the prompt's own k-th picture.
            images_kwargs: `min_dynamic_tiles`, `max_dynamic_tiles`, `use_thumbnail`.
            videos_kwargs: `fps` and `timestamps` per video; default: what the loaded videos carry.
                `max_dynamic_tiles`: cut frames as pictures are; default: a frame is one tile.
            add_special_tokens: accepted as false: the template writes them all.
            kwargs: those of `images_kwargs`, by themselves.

        Returns:
            `input_ids`, `attention_mask` [b, s]; with media `pixel_values` [n, 3, S, S] and `image_sizes`.

        Raises:
            ValueError: prompts and media do not match; truncation (it would cut image tokens).
        """
        if text is None:
            raise ValueError("the processor needs text: write the prompt with apply_chat_template")
        tiling = {name: kwargs.pop(name) for name in _TILING if name in kwargs} | dict(images_kwargs or {})
        videos_kwargs = dict(videos_kwargs or {})
        frame_tiles = videos_kwargs.pop("max_dynamic_tiles", None)
        if kwargs.pop("truncation", None):
            raise ValueError("truncation would cut image tokens: use fewer frames or tiles instead")
        if add_special_tokens:
            raise ValueError("the chat template writes all special tokens: add_special_tokens must be false")
        if kwargs:
            raise TypeError(f"the processor does not know {', '.join(sorted(kwargs))}")
        texts = [text] if isinstance(text, str) else list(text)
        videos = _with_metadata([] if videos is None else videos, videos_kwargs)
        shown: dict[str, list[tuple[PromptMedium, BatchFeature]]] = {
            "image": [self.show(image, tiling) for image in _flat(images)],
            "video": [self.show(video, frame_tiles=frame_tiles) for video in videos],
        }
        used, rows, tiles = {"image": 0, "video": 0}, [], []
        for one in texts:
            rest = {kind: [said for said, _ in items[used[kind] :]] for kind, items in shown.items()}
            written, order = self.place(one, rest)
            rows.append(self.encode(written))
            tiles += [shown[kind][used[kind] + number][1] for kind, number in order]
            for kind, _ in order:
                used[kind] += 1
        for kind, items in shown.items():
            if used[kind] != len(items):
                raise ValueError(f"{len(items)} {kind}s were given and the prompts use {used[kind]}")
        padded: dict[str, Any] = {"padding": padding, "max_length": max_length}
        padded |= {"pad_to_multiple_of": pad_to_multiple_of, "padding_side": padding_side}
        # transformers 4 advises to pad while tokenizing, which rows of ids cannot.
        getattr(self.tokenizer, "deprecation_warnings", {})["Asking-to-pad-a-fast-tokenizer"] = True
        data = dict(self.tokenizer.pad({"input_ids": rows}, **padded))
        for name in ("pixel_values", "image_sizes") if tiles else ():
            data[name] = torch.cat([part[name] for part in tiles])
        return BatchFeature(data, tensor_type=return_tensors)

    def show(
        self, item: Any, tiling: Mapping[str, Any] | None = None, frame_tiles: int | None = None
    ) -> tuple[PromptMedium, BatchFeature]:
        """What a prompt says of a picture or a video, and its tiles from the image processor.

        Args:
            item: a picture, `VideoFrames`, or what reads one.
            tiling: `images_kwargs` of a call.
            frame_tiles: cuts the frames of a video as pictures are; otherwise a frame is one tile.
        """
        if callable(item):
            item = item()
        if not isinstance(item, VideoFrames):
            data = self.image_processor(images=[item], **(tiling or {}))
            return PromptMedium((len(data["pixel_values"]),)), data
        if frame_tiles is None:
            data = self.image_processor(videos=[item])
            counts = [1] * len(item)
        else:
            data = self.image_processor(images=list(item), max_dynamic_tiles=frame_tiles)
            counts = data["num_tiles"].tolist()
        times = tuple(item.timestamps)
        return PromptMedium(tuple(counts), item.fps, times, self.said(item.subtitles, times)), data

    def said(self, subtitles: Iterable[Subtitle], times: Sequence[float]) -> tuple[tuple[int, str], ...]:
        """`between_frames` of a user's turn: special tokens in them stay text."""
        return tuple((before, self.shield(text, "user")) for before, text in between_frames(subtitles, times))

    def fit(
        self,
        text: str,
        images: Sequence[Any],
        videos: Sequence[Mapping[str, Any]],
        length: int,
        answer: int | None = None,
        tiling: Mapping[str, Any] | None = None,
        frame_tiles: int | None = None,
    ) -> Fitted:
        """Limits of frames and tiles with which a prompt and its answer have at most `length` tokens, as far
        as limits can be lowered (`room`). It is for who knows the length: nothing here asks for it by itself.

        Args:
            text: what `apply_chat_template` gave.
            images, videos: sources of pictures, and parts of messages, in the order of their numbers.
            answer: tokens that it may have.
            tiling: `images_kwargs` of the call.
            frame_tiles: `max_dynamic_tiles` of its `videos_kwargs`.
        """
        return fit(self, text, images, videos, prompt_room(length, answer), tiling, frame_tiles)

    def place(
        self,
        text: str,
        media: Mapping[str, Sequence[PromptMedium]],
        tokens_per_tile: int | None = None,
    ) -> tuple[str, list[tuple[str, int]]]:
        """A prompt with labels and image tokens where its placeholders were.

        Args:
            media: the images and videos (keys `image`, `video`) that it may show.
            tokens_per_tile: others than the processor's.

        Returns:
            The prompt, and the media that it shows in reading order: kind, and place in `media` from 0.

        Raises:
            ValueError: a placeholder without its medium, used twice, or left out before another.
        """
        order: list[tuple[str, int]] = []
        of_tile = self.tokens_per_tile if tokens_per_tile is None else tokens_per_tile

        def written(match: re.Match[str]) -> str:
            kind, number = match.group(1), int(match.group(2))
            if not 1 <= number <= len(media[kind]):
                raise ValueError(
                    f"the prompt asks for {match.group()}, there are {len(media[kind])} {kind}s for it"
                )
            if (kind, number - 1) in order:
                raise ValueError(f"the prompt uses {match.group()} twice")
            order.append((kind, number - 1))
            return media[kind][number - 1].write(number, of_tile)

        text = _PLACEHOLDER.sub(written, text)
        for kind in media:
            numbers = sorted(place + 1 for own, place in order if own == kind)
            if numbers != list(range(1, len(numbers) + 1)):
                raise ValueError(f"the prompt's {kind}s are numbered {numbers}: number them 1, 2, ...")
        return text, order

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's `decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def _special_tokens(self) -> re.Pattern[str]:
        tokens = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def shield(self, text: str, role: str) -> str:
        """`text` of a turn of `role`, in which special tokens, and media names outside the user's turns, stay
        text when `encode` reads them."""
        text = text.replace(_SHIELD, "")
        special = self._special_tokens()
        for pattern in (special,) if role == "user" else (special, _PLACEHOLDER):
            text = pattern.sub(lambda match: match.group()[0] + _SHIELD + match.group()[1:], text)
        return text

    def _shielded(self, conversation: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        result = []
        for message in conversation:
            role, content = message["role"], message["content"]
            if isinstance(content, str):
                content = self.shield(content, role)
            else:
                content = [
                    {**part, "text": self.shield(part["text"], role)} if part["type"] == "text" else part
                    for part in content
                ]
            result.append({**message, "content": content})
        return result

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, in which shielded text is text."""
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


def _is_batch(conversations: Any) -> bool:
    return bool(conversations) and not isinstance(conversations[0], Mapping)


def _flat(images: Any) -> list[Any]:
    """Pictures given one by one, in a list, or in a list for each prompt."""
    if images is None:
        return []
    return [image for one in images for image in _flat(one)] if isinstance(images, list | tuple) else [images]


def _with_metadata(videos: Iterable[Any], kwargs: dict[str, Any]) -> list[Any]:
    """Frame lists as `VideoFrames`; `fps` and `timestamps` of `videos_kwargs` win over what they carry."""
    result: list[Any] = []
    for i, video in enumerate(videos):
        if callable(video):  # not read yet: what it carries
            result.append(video)
            continue
        given = {name: kwargs[name][i] for name in ("fps", "timestamps") if kwargs.get(name)}
        fps = given.get("fps", getattr(video, "fps", DEFAULT_FPS))
        default = getattr(video, "timestamps", [k / fps for k in range(len(video))])
        times = given.get("timestamps", default)
        if len(times) != len(video):
            raise ValueError(f"video {i + 1} has {len(video)} frames and {len(times)} timestamps")
        result.append(VideoFrames(video, fps, times, subtitles=getattr(video, "subtitles", ())))
    return result
