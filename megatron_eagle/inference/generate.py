"""Answers from an exported model: text, pictures and videos in, text out.

Needs transformers and the exported folder, nothing of Megatron and nothing of the training code. The folder's
own Python files are run (`trust_remote_code`); it must therefore be a local folder, and the Hugging Face hub
is switched off.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_eagle.errors import UserError

# As a data record writes them -> as the exported processor does.
_VIDEO_KEYS = {
    **dict.fromkeys(("start_time", "start", "video_start"), "video_start"),
    **dict.fromkeys(("end_time", "end", "video_end"), "video_end"),
    **{key: key for key in ("fps", "nframes", "min_frames", "max_frames")},
}


@dataclass(frozen=True)
class Request:
    """One question. Pictures and videos are shown before the prompt, unless it names them `<image-k>`.

    A video is a path, or `{"video": path}` with `start_time`, `end_time` (seconds), `fps`, `nframes`,
    `min_frames`, `max_frames`. `max_tiles` overrides the processor's limit of tiles per picture;
    `frame_tiles` cuts video frames, otherwise one tile each, into up to as many.
    """

    prompt: str
    images: tuple[str, ...] = ()
    videos: tuple[str | dict[str, Any], ...] = ()
    max_tiles: int | None = None
    frame_tiles: int | None = None

    @classmethod
    def from_record(cls, record: Any, where: str) -> "Request":
        """From one line of a batch file. Raises `UserError` naming `where`."""
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise UserError(f'{where}: expected an object with a "prompt" (text)')
        images, videos = record.get("images"), record.get("videos")
        for name, value, kinds in (("images", images, str), ("videos", videos, (str, dict))):
            if value is not None and not (
                isinstance(value, list) and all(isinstance(v, kinds) for v in value)
            ):
                raise UserError(f'{where}: "{name}" must be a list of paths')
        tiles = {name: record.get(name) for name in ("max_tiles", "frame_tiles")}
        for name, value in tiles.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise UserError(f'{where}: "{name}" must be a whole number of at least 1, not {value!r}')
        return cls(record["prompt"], tuple(images or ()), tuple(videos or ()), **tiles)


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

    def answer(self, request: Request, sampling: Sampling = Sampling(), *, stream: bool = False) -> str:
        """The answer; with `stream` also printed while it is generated."""


class ExportedModel:
    """An exported model and its processor, on the GPU if there is one.

    Raises:
        UserError: the folder is missing, no export, or cannot be loaded.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        _check_export(self.folder)
        # Before transformers is imported for the first time: it reads them then.
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
        from transformers import AutoModel, AutoProcessor, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        source: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
        try:
            self.processor = AutoProcessor.from_pretrained(str(self.folder), **source)
            self.model = AutoModel.from_pretrained(str(self.folder), torch_dtype="auto", **source).eval()
        except Exception as error:  # whatever its files or its code raise: the folder is at fault
            raise UserError(f"{self.folder}: cannot be loaded as an export: {_first_line(error)}") from error
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")

    def answer(self, request: Request, sampling: Sampling = Sampling(), *, stream: bool = False) -> str:
        """The answer, greedily decoded; with `stream` also printed while it is generated.

        Raises:
            UserError: a picture or video is missing or unreadable, or does not fit the prompt.
        """
        inputs = self._inputs(request, sampling).to(self.model.device)
        streamer = None
        if stream:
            from transformers import TextStreamer

            streamer = TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = self.model.generate(
            **inputs, max_new_tokens=sampling.max_new_tokens, do_sample=False, streamer=streamer
        )
        return self.processor.decode(ids[0], skip_special_tokens=True).strip()

    def _inputs(self, request: Request, sampling: Sampling) -> Any:
        content: list[dict[str, Any]] = [{"type": "image", "image": path} for path in request.images]
        content += [video_item(video, sampling) for video in request.videos]
        content.append({"type": "text", "text": request.prompt})
        messages = [{"role": "user", "content": content}]
        max_tiles = request.max_tiles or sampling.max_tiles
        tiling = {} if max_tiles is None else {"max_dynamic_tiles": max_tiles}
        frames = {} if request.frame_tiles is None else {"max_dynamic_tiles": request.frame_tiles}
        processor = self.processor
        try:
            text = processor.apply_chat_template(messages, add_generation_prompt=True)
            images, videos = processor.process_vision_info(messages)
            settings = {"images_kwargs": tiling, "videos_kwargs": frames, "return_tensors": "pt"}
            return processor(text=[text], images=images, videos=videos, **settings)
        except ValueError as error:  # the processor's own messages name the file or the placeholder
            raise UserError(str(error)) from None


def answer_file(
    model: Answers,
    source: Path,
    output: Path,
    sampling: Sampling,
    progress: Callable[[list], Iterator] = iter,
) -> int:
    """Answer every line of a JSONL file; returns how many.

    A line is a `Request` as JSON; the same object with "answer" added is written to `output` at once.

    Raises:
        UserError: a file or a line is wrong; the line is named, answers written before it stay.
    """
    requests = list(read_requests(source))
    try:
        file = output.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    with file:
        for where, record, request in progress(requests):
            try:
                answer = model.answer(request, sampling)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            file.write(json.dumps({**record, "answer": answer}, ensure_ascii=False) + "\n")
            file.flush()
    return len(requests)


def read_requests(source: Path) -> Iterator[tuple[str, Mapping[str, Any], Request]]:
    """(place, record, request) of every line of a batch file. Raises `UserError` naming file and line."""
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read: {_first_line(error)}") from None
    for number, line in enumerate(lines, 1):
        where = f"{source}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            problem = "is empty" if not line.strip() else f"is not valid JSON: {error}"
            raise UserError(f"{where} {problem}; every line must be a request") from None
        yield where, record, Request.from_record(record, where)


def video_item(video: str | dict[str, Any], sampling: Sampling) -> dict[str, Any]:
    """A video of a request as the exported processor takes it. Raises `UserError` naming what is wrong."""
    record = {"video": video} if isinstance(video, str) else dict(video)
    path = record.pop("video", None) or record.pop("path", None)
    if not isinstance(path, str):
        raise UserError(f'a video needs its file under "video", got {video!r}')
    unknown = [key for key in record if key not in _VIDEO_KEYS]
    if unknown:
        raise UserError(f"{path}: unknown setting {unknown[0]!r} of a video; known: {', '.join(_VIDEO_KEYS)}")
    item = {_VIDEO_KEYS[key]: value for key, value in record.items() if value is not None}
    for key, value in item.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{path}: {key} must be a number, not {value!r}")
    if "nframes" not in item:
        item.setdefault("fps", sampling.fps)
        item.setdefault("max_frames", sampling.max_frames)
    return {"type": "video", "video": path, **item}


def _check_export(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected an exported model (tools/convert_hf.py export)")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        remote_code = config["auto_map"]["AutoModel"]
    except (OSError, ValueError, KeyError, TypeError):
        remote_code = None
    if not remote_code or config.get("model_type") != "eagle_2_5_vl":
        raise UserError(
            f"{folder}: no exported Eagle 2.5 model (its config.json names no model code); "
            "make one with tools/convert_hf.py export"
        )
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder}: {name} is missing, so prompts cannot be made; export with a tokenizer"
            )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
