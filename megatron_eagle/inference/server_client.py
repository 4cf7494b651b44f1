"""Answers from a server that speaks OpenAI's chat completions (vLLM and others), with pictures and videos.

A server with the export's plugin (`hf_model/vllm_plugin`) takes a video as its file, and cuts pictures as it
is asked to. Of any other it is known that it takes pictures: a video is sent as its frames, each after its
label as the exported processor writes it, and tiling is the server's.
"""

import base64
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from PIL import Image

from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.media_files import load_image, video_of_part
from megatron_eagle.hf_model.prompt import frame_label, subtitle_lines, video_label
from megatron_eagle.hf_model.subtitles import between_frames
from megatron_eagle.inference.generate import OnRead, OnText, Request, Sampling, video_item

_DEFAULT = Sampling()
_TIMEOUT, _TIMEOUT_TOKENS = (
    600,
    32_768,
)  # seconds without a byte from the server, for prompts of so many tokens


class ServedModel:
    """A model behind the URL `endpoint`, as `http://127.0.0.1:8000` or `.../v1`; the first one that it names
    unless `model` does. A key in the environment's OPENAI_API_KEY is sent along.

    An answer is waited for as long as a byte comes within `timeout` seconds. None: 600, and as many times
    more as the server takes more than 32,768 tokens: nothing comes before the whole prompt is read.

    Raises:
        UserError: no http(s) URL, the server cannot be reached, or it serves nothing.
    """

    def __init__(self, endpoint: str, model: str | None = None, timeout: float | None = None) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"{endpoint}: expected the URL of a server, as http://127.0.0.1:8000")
        self._timeout = timeout
        self.url = endpoint.rstrip("/") if parts.path.strip("/") else f"{endpoint.rstrip('/')}/v1"
        if model is None:
            names = list(self._models())
            if not names:
                raise UserError(f"{self.url}: the server names no model; name one with --model")
            model = names[0]
        self.model = model

    def read_max_positions(self) -> int | None:
        """Tokens of prompt and answer that the server takes; None where it does not say (vLLM does)."""
        try:
            limit = self._models().get(self.model, {}).get("max_model_len")
        except UserError:  # it may answer all the same
            return None
        return limit if isinstance(limit, int) else None

    def answer(
        self,
        request: Request,
        sampling: Sampling = _DEFAULT,
        *,
        on_text: OnText | None = None,
        on_read: OnRead | None = None,
    ) -> str:
        """The answer, greedily decoded; its pieces go to `on_text` while it is generated.

        Raises:
            UserError: a picture or video is missing or unreadable, or the server refuses the request.
        """
        body = self.body(request, sampling)
        body["stream"] = on_text is not None
        if on_read is not None:
            on_read()
        with self._open("chat/completions", body) as response:
            if on_text is None:
                reply = _json(response.read(), self.url)
                try:
                    return (reply["choices"][0]["message"]["content"] or "").strip()
                except (KeyError, IndexError, TypeError):
                    raise UserError(f"{self.url}: the server's reply has no answer in it") from None
            pieces = []
            for piece in _events(response, self.url):
                on_text(piece)
                pieces.append(piece)
            return "".join(pieces).strip()

    def body(self, request: Request, sampling: Sampling = _DEFAULT) -> dict[str, Any]:
        """What is sent to the server for a request.

        Raises:
            UserError: as `answer`, and for numbers of tiles that only a server with the plugin takes.
        """
        max_tiles, frame_tiles = request.max_tiles or sampling.max_tiles, request.frame_tiles
        if (max_tiles or frame_tiles) and self.cutting is None:
            raise UserError("tiles are the server's own setting; leave out max_tiles and frame_tiles")
        tiling: dict[str, Any] = {} if max_tiles is None else {"max_dynamic_tiles": max_tiles}
        if frame_tiles is not None:
            tiling["videos_kwargs"] = {"max_dynamic_tiles": frame_tiles}
        body = {
            "model": self.model,
            "messages": request.conversation(self._media(request, sampling, max_tiles)),
            "max_tokens": sampling.max_new_tokens,
            "temperature": 0,
        }
        return {**body, "mm_processor_kwargs": tiling} if tiling else body

    @cached_property
    def cutting(self) -> dict[str, Any] | None:
        """How a server with the export's plugin cuts pictures, for `page_pictures`; None: it has none."""
        try:
            settings = self.get("export")
        except UserError:
            return None
        names = ("tile_size", "max_tiles", "tiling")
        return {name: settings[name] for name in names} if all(name in settings for name in names) else None

    @cached_property
    def timeout(self) -> float:
        """Seconds without a byte after which an answer is given up."""
        if self._timeout is not None:
            return self._timeout
        return _TIMEOUT * max(1, (self.read_max_positions() or 0) / _TIMEOUT_TOKENS)

    def get(self, path: str) -> dict[str, Any]:
        """What the server says at a path below its URL.

        Raises:
            UserError: it says nothing, or no object.
        """
        with self._open(path) as response:
            return _json(response.read(), self.url)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request.

        Raises:
            UserError: the server refuses it, or replies no object.
        """
        with self._open(path, body) as response:
            return _json(response.read(), self.url)

    def _media(self, request: Request, sampling: Sampling, max_tiles: int | None) -> list[dict[str, Any]]:
        """Pictures, pages and videos in OpenAI's form."""
        content: list[dict[str, Any]] = []
        try:
            content += [_picture(load_image(path)) for path in request.images]
            for path in request.documents:
                from megatron_eagle.inference.pages import page_pictures  # only documents need pdfium

                cutting = {**(self.cutting or {}), **({} if max_tiles is None else {"max_tiles": max_tiles})}
                content += [_picture(page) for page in page_pictures(path, **cutting)]
            for number, video in enumerate(request.videos, 1):
                item = video_item(video, sampling)
                options = {k: v for k, v in item.items() if k not in ("type", "video") and v is not None}
                if self.cutting is None:
                    content += _frames(number, item["video"], options)
                else:
                    content.append(_video(item["video"], options))
        except ValueError as error:  # the loaders' own messages name the file
            raise UserError(str(error)) from None
        return content

    def _models(self) -> dict[str, dict[str, Any]]:
        """What the server says of each model, by name."""
        entries = self.get("models").get("data") or []
        return {entry["id"]: entry for entry in entries if isinstance(entry, dict) and "id" in entry}

    @contextmanager
    def _open(self, path: str, body: dict[str, Any] | None = None) -> Iterator[HTTPResponse]:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        data = None if body is None else json.dumps(body).encode()
        url = f"{self.url}/{path}"
        timeout = (self._timeout or _TIMEOUT) if body is None else self.timeout  # only answers take long
        try:
            request = urllib.request.Request(url, data, headers)
            response: HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            raise UserError(f"{url}: the server says {error.code}: {_reason(error)}") from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _late(url, timeout) from None
            raise UserError(f"{url}: cannot be reached: {reason}") from None
        with response:
            try:
                yield response
            except TimeoutError:
                raise _late(url, timeout) from None


def _late(url: str, timeout: float) -> UserError:
    return UserError(f"{url}: nothing came for {timeout:g} seconds; --timeout waits longer")


def _frames(number: int, path: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Video `number`, from 1, as labels and pictures."""
    frames = video_of_part({"video": path, **options})
    content: list[dict[str, Any]] = [_text(video_label(number, frames.fps))]
    said = between_frames(frames.subtitles, frames.timestamps)
    for i, (frame, time) in enumerate(zip(frames, frames.timestamps, strict=True)):
        content += _said(said, i)
        content += [_text(frame_label(i + 1, time)), _picture(frame)]
    return content + _said(said, len(frames))


def _said(said: Sequence[tuple[int, str]], frames: int) -> list[dict[str, Any]]:
    """The subtitles after so many frames."""
    lines = subtitle_lines(text for before, text in said if before == frames)
    return [_text(lines)] if lines else []


def _video(path: str, options: dict[str, Any]) -> dict[str, Any]:
    """A video as its file, and in the URL's fragment how it is sampled."""
    url = path
    if not path.startswith(("http://", "https://")):
        try:
            data = Path(path.removeprefix("file://")).read_bytes()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            raise ValueError(f"video {'not found' if missing else 'cannot be read'}: {path}") from None
        url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    if "subtitles" in options:
        options = {**options, "subtitles": json.dumps(options["subtitles"])}
    fragment = f"#{urlencode(options)}" if options else ""
    return {"type": "video_url", "video_url": {"url": url + fragment}}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _picture(image: Image.Image) -> dict[str, Any]:
    """Lossless: the server sees the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def _events(response: HTTPResponse, url: str) -> Iterator[str]:
    """Pieces of text out of a stream of server-sent events."""
    for line in response:
        text = line.decode("utf-8", "replace").strip()
        if not text.startswith("data:"):
            continue
        text = text.removeprefix("data:").strip()
        if text == "[DONE]":
            return
        event = _json(text.encode(), url)
        if "error" in event:
            raise UserError(f"{url}: the server stopped: {event['error']}")
        for choice in event.get("choices", []):
            yield (choice.get("delta") or {}).get("content") or ""
    raise UserError(f"{url}: the server's answer broke off")


def _json(data: bytes, url: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{url}: the server's reply is not that of an OpenAI-compatible server")
    return value


def _reason(error: urllib.error.HTTPError) -> str:
    """The server's own words, in one line."""
    text = error.read().decode("utf-8", "replace")
    try:
        reply = json.loads(text)
        text = str((reply.get("error") or {}).get("message") or reply.get("message") or text)
    except (ValueError, AttributeError):
        pass
    return (text.strip().splitlines() or [error.reason])[0][:300]
