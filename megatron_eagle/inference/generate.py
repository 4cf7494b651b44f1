"""Answers from an exported model: text, pictures, videos and PDF files in, text out.

Needs transformers and the exported folder, nothing of Megatron and nothing of the training code (PDF files
are drawn by `data.media`). The folder's own Python files are run (`trust_remote_code`); it must therefore be
a local folder, and the Hugging Face hub is switched off.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.media_files import subtitles_of_part
from megatron_eagle.inference.prefill import prefill
from megatron_eagle.positions import new_tokens, warn_of_lowered

# Tokens. PyTorch's attention builds a mask of piece x prompt: longer pieces cost more than they save.
PREFILL_CHUNK = 2048
# As a data record writes them -> as the exported processor does.
_VIDEO_KEYS = {
    **dict.fromkeys(("start_time", "start", "video_start"), "video_start"),
    **dict.fromkeys(("end_time", "end", "video_end"), "video_end"),
    **{key: key for key in ("fps", "nframes", "min_frames", "max_frames", "subtitles")},
}


OnText = Callable[[str], None]
OnRead = Callable[[], None]


@dataclass(frozen=True)
class Request:
    """One question. Media are shown before the prompt, unless it names them `<image-k>` or `<video-k>`.

    Attributes:
        videos: paths, or `{"video": path}` with `start_time`, `end_time` (seconds), `fps`, `nframes`,
            `min_frames`, `max_frames`, and `subtitles`, `[[start, end, text], ...]`, that are written between
            the frames (`hf_model.subtitles`).
        max_tiles: overrides the processor's limit of tiles per picture.
        frame_tiles: cuts video frames, otherwise one tile each, into up to as many.
        documents: PDF files; their pages are pictures, numbered after `images`.
        turns: earlier questions and answers of this conversation; media belong to its first question.
    """

    prompt: str
    images: tuple[str, ...] = ()
    videos: tuple[str | dict[str, Any], ...] = ()
    max_tiles: int | None = None
    frame_tiles: int | None = None
    documents: tuple[str, ...] = ()
    turns: tuple[tuple[str, str], ...] = ()

    def conversation(self, media: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages of a chat, with `media` at the beginning of the first question."""
        messages: list[dict[str, Any]] = []
        for question, answer in self.turns:
            messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        messages.append({"role": "user", "content": [{"type": "text", "text": self.prompt}]})
        messages[0]["content"][:0] = media
        return messages

    @classmethod
    def from_record(cls, record: Any, where: str) -> "Request":
        """From one line of a batch file.

        Raises:
            UserError: the line is no request; `where` is named.
        """
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f'{where}: expected an object with a "prompt" (text)')
        media = {name: record.get(name) for name in ("images", "videos", "documents")}
        for name, value in media.items():
            kinds = (str, dict) if name == "videos" else str
            if value is not None and not (
                isinstance(value, list) and all(isinstance(v, kinds) for v in value)
            ):
                raise UserError(f'{where}: "{name}" must be a list of paths')
        tiles: dict[str, Any] = {name: record.get(name) for name in ("max_tiles", "frame_tiles")}
        for name, value in tiles.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f'{where}: "{name}" must be a whole number of at least 1, not {value!r}')
        lists: dict[str, Any] = {name: tuple(value or ()) for name, value in media.items()}
        return cls(record["prompt"], **lists, **tiles)


@dataclass(frozen=True)
class Sampling:
    """How media are sampled (None: the processor's own, usually 2 fps, 256 frames and 12 tiles per picture),
    and how long an answer may be, in tokens. What a request itself says wins."""

    fps: float | None = None
    max_frames: int | None = None
    max_tiles: int | None = None
    max_new_tokens: int = 512


class Answers(Protocol):
    """What answers requests: an exported model here, or a server."""

    def answer(
        self,
        request: Request,
        sampling: Sampling = Sampling(),
        *,
        on_text: OnText | None = None,
        on_read: OnRead | None = None,
    ) -> str:
        """The answer; its pieces go to `on_text` while it is generated. `on_read` is called before, when the
        media are read. Both may raise to end it."""


class ExportedModel:
    """An exported model and its processor, on the GPU if there is one.

    Prompts of more than `prefill_chunk` tokens go through the model in pieces of as many (`prefill`). They
    show as many frames and tiles as fit into `max_positions` (the processor's `fit`); what is longer even so
    is refused, and answers end there, unless `allow_long_prompts`.

    Raises:
        UserError: the folder is missing, no export, or cannot be loaded.
    """

    def __init__(
        self, folder: str | Path, prefill_chunk: int = PREFILL_CHUNK, *, allow_long_prompts: bool = False
    ) -> None:
        self.folder, self.prefill_chunk = Path(folder), prefill_chunk
        self.allow_long_prompts, self._told = allow_long_prompts, False
        self.processor = load_processor(self.folder)
        self.model = _load(self.folder, "AutoModel", torch_dtype="auto").eval()
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def max_positions(self) -> int:
        """Tokens that it was trained for."""
        return int(self.model.config.text_config.max_position_embeddings)

    def answer(
        self,
        request: Request,
        sampling: Sampling = Sampling(),
        *,
        on_text: OnText | None = None,
        on_read: OnRead | None = None,
    ) -> str:
        """The answer, greedily decoded; its pieces go to `on_text` while it is generated.

        Raises:
            UserError: a picture, video or document is missing or unreadable, or does not fit the prompt, or
                the prompt is longer than the model was trained for.
        """
        inputs = self._inputs(request, sampling)
        if on_read is not None:
            on_read()
        streamer = None if on_text is None else _streamer(self.processor.tokenizer, on_text)
        answer = self.generate(inputs, sampling.max_new_tokens, streamer)
        return str(self.processor.decode(answer[0], skip_special_tokens=True)).strip()

    def generate(self, inputs: Any, max_new_tokens: int, streamer: Any = None) -> torch.Tensor:
        """New ids [1, n] after the processor's output, greedily; a long prompt is read in pieces.

        Raises:
            UserError: a prompt beyond `max_positions`.
        """
        ids = inputs["input_ids"].to(self.model.device)
        allow = self.allow_long_prompts
        count = new_tokens(ids.shape[1], max_new_tokens, self.max_positions, allow=allow)
        settings = {"max_new_tokens": count, "do_sample": False, "streamer": streamer}
        if ids.shape[1] <= self.prefill_chunk:
            whole: torch.Tensor = self.model.generate(**inputs.to(self.model.device), **settings)
            return whole
        cache, embeddings = prefill(self.model, ids, inputs.get("pixel_values"), self.prefill_chunk)
        new: torch.Tensor = self.model.language_model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            generation_config=self.model.generation_config,
            **settings,
        )
        return new

    def _inputs(self, request: Request, sampling: Sampling) -> Any:
        max_tiles = request.max_tiles or sampling.max_tiles
        processor = self.processor
        images: list[Any] = list(request.images)
        for path in request.documents:
            images += pages_of(processor, path, max_tiles)
        videos = [video_item(video, sampling) for video in request.videos]
        if any(video.get("subtitles") for video in videos) and not hasattr(processor, "takes_subtitles"):
            raise UserError(f"{self.folder}: its processor leaves subtitles of videos out; export it again")
        tiling = {} if max_tiles is None else {"max_dynamic_tiles": max_tiles}
        frame_tiles = request.frame_tiles

        def conversation() -> list[dict[str, Any]]:
            return request.conversation([*({"type": "image", "image": image} for image in images), *videos])

        try:
            text = processor.apply_chat_template(conversation(), add_generation_prompt=True)
            if not self.allow_long_prompts and hasattr(processor, "fit"):  # an older export has not
                answer, length = sampling.max_new_tokens, self.max_positions
                fitted = processor.fit(text, images, videos, length, answer, tiling, frame_tiles)
                videos, tiling, frame_tiles = fitted.videos, fitted.tiling, fitted.frame_tiles
                self._tell(fitted)
            # One at a time is decoded.
            reading = {"read": False} if hasattr(processor, "fit") else {}
            images_shown, videos_shown = processor.process_vision_info(conversation(), **reading)
            frames = {} if frame_tiles is None else {"max_dynamic_tiles": frame_tiles}
            settings = {"images_kwargs": tiling, "videos_kwargs": frames, "return_tensors": "pt"}
            return processor(text=[text], images=images_shown, videos=videos_shown, **settings)
        except ValueError as error:  # the processor's own messages name the file or the placeholder
            raise UserError(str(error)) from None

    def _tell(self, fitted: Any) -> None:
        """Say once that prompts show less than was asked for; refuse what does not fit even so.

        Raises:
            UserError: as `new_tokens`, before anything is decoded.
        """
        if fitted.tokens is not None:
            new_tokens(fitted.tokens, 0, self.max_positions, allow=False)
        if fitted.lowered and not self._told:
            self._told = True
            warn_of_lowered(self.max_positions)


def load_processor(folder: Path) -> Any:
    """The processor of an exported folder.

    Raises:
        UserError: it is missing or no export.
    """
    _check_export(folder)
    return _load(folder, "AutoProcessor")


def read_max_positions(folder: Path) -> int:
    """Tokens that an exported model was trained for.

    Raises:
        UserError: as `load_processor`.
    """
    _check_export(folder)
    return int(_load(folder, "AutoConfig").text_config.max_position_embeddings)


def pages_of(processor: Any, path: str, max_tiles: int | None, max_pages: int | None = None) -> list[Any]:
    """The pages of a PDF file as pictures for this processor.

    Raises:
        UserError: as `page_pictures`.
    """
    from megatron_eagle.inference.pages import page_pictures  # only documents need pdfium

    images = processor.image_processor
    return page_pictures(
        path,
        tile_size=images.size["height"],
        max_tiles=max_tiles or images.max_dynamic_tiles,
        tiling=images.tiling,
        max_pages=max_pages,
    )


def video_item(video: str | dict[str, Any], sampling: Sampling) -> dict[str, Any]:
    """A video of a request as the exported processor takes it; nothing is read yet.

    Raises:
        UserError: it names no file, or has a setting that is unknown or no number.
    """
    record = {"video": video} if isinstance(video, str) else dict(video)
    path = record.pop("video", None) or record.pop("path", None)
    if not isinstance(path, str):
        raise UserError(f'a video needs its file under "video", got {video!r}')
    unknown = [key for key in record if key not in _VIDEO_KEYS]
    if unknown:
        raise UserError(f"{path}: unknown setting {unknown[0]!r} of a video; known: {', '.join(_VIDEO_KEYS)}")
    item = {_VIDEO_KEYS[key]: value for key, value in record.items() if value is not None}
    try:
        subtitles_of_part(item)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    for key, value in item.items():
        if key != "subtitles" and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{path}: {key} must be a number, not {value!r}")
    if "nframes" not in item:
        item.setdefault("fps", sampling.fps)
        item.setdefault("max_frames", sampling.max_frames)
    return {"type": "video", "video": path, **item}


def _check_export(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; expected an exported model (`megatron-eagle convert export`)"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        remote_code = config["auto_map"]["AutoModel"]
    except (OSError, ValueError, KeyError, TypeError):
        remote_code = None
    if not remote_code or config.get("model_type") != "eagle_2_5_vl":
        raise UserError(
            f"{folder}: no exported Eagle 2.5 model (its config.json names no model code); "
            "make one with `megatron-eagle convert export`"
        )
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: {name} is missing, so prompts cannot be made; export with a tokenizer"
            )


def _load(folder: Path, auto: str, **options: Any) -> Any:
    # Before transformers is imported for the first time: it reads them then.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
    try:
        return getattr(transformers, auto).from_pretrained(str(folder), **source, **options)
    except Exception as error:  # whatever its files or its code raise: the folder is at fault
        raise UserError(f"{folder}: cannot be loaded as an export: {first_line(error)}") from error


def _streamer(tokenizer: Any, on_text: OnText) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
