"""Answers from a server that speaks OpenAI's chat completions (vLLM and others), with pictures and videos.

The server knows pictures only: a video is sent as its frames, each a picture after its label, as the exported
processor labels them. Tiling is the server's.
"""

import base64
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.media_files import load_image, load_video
from megatron_eagle.hf_model.prompt import frame_label
from megatron_eagle.inference.generate import OnText, Request, Sampling, video_item

_DEFAULT = Sampling()
_TIMEOUT = 600  # seconds without a byte from the server


class ServedModel:
    """A model behind the URL `endpoint`, as `http://127.0.0.1:8000` or `.../v1`; the first one that it names
    unless `model` does. A key in the environment's OPENAI_API_KEY is sent along.

    Raises:
        UserError: no http(s) URL, the server cannot be reached, or it serves nothing.
    """

    def __init__(self, endpoint: str, model: str | None = None) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"{endpoint}: expected the URL of a server, as http://127.0.0.1:8000")
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
        self, request: Request, sampling: Sampling = _DEFAULT, *, on_text: OnText | None = None
    ) -> str:
        """The answer, greedily decoded; its pieces go to `on_text` while it is generated.

        Raises:
            UserError: a picture or video is missing or unreadable, or the server refuses the request.
        """
        if request.max_tiles or sampling.max_tiles or request.frame_tiles:
            raise UserError("tiles are the server's own setting; leave out max_tiles and frame_tiles")
        body = {
            "model": self.model,
            "messages": request.conversation(_media(request, sampling)),
            "max_tokens": sampling.max_new_tokens,
            "temperature": 0,
            "stream": on_text is not None,
        }
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

    def _models(self) -> dict[str, dict[str, Any]]:
        """What the server says of each model, by name."""
        with self._open("models") as response:
            entries = _json(response.read(), self.url).get("data") or []
        return {entry["id"]: entry for entry in entries if isinstance(entry, dict) and "id" in entry}

    def _open(self, path: str, body: dict[str, Any] | None = None) -> HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        data = None if body is None else json.dumps(body).encode()
        url = f"{self.url}/{path}"
        try:
            request = urllib.request.Request(url, data, headers)
            response: HTTPResponse = urllib.request.urlopen(request, timeout=_TIMEOUT)
            return response
        except urllib.error.HTTPError as error:
            raise UserError(f"{url}: the server says {error.code}: {_reason(error)}") from None
        except OSError as error:
            raise UserError(f"{url}: cannot be reached: {getattr(error, 'reason', error)}") from None


def _media(request: Request, sampling: Sampling) -> list[dict[str, Any]]:
    """Pictures, pages and labelled frames in OpenAI's form."""
    content: list[dict[str, Any]] = []
    try:
        content += [_picture(load_image(path)) for path in request.images]
        for path in request.documents:
            from megatron_eagle.inference.pages import page_pictures  # only documents need pdfium

            content += [_picture(page) for page in page_pictures(path)]
        for number, video in enumerate(request.videos, 1):
            item = video_item(video, sampling)
            options = {k: v for k, v in item.items() if k not in ("type", "video") and v is not None}
            frames = load_video(item["video"], **options)
            content.append(_text(f"Video {number} sampled with {frames.fps:.2f} fps: "))
            for i, (frame, time) in enumerate(zip(frames, frames.timestamps, strict=True), 1):
                content += [_text(frame_label(i, time)), _picture(frame)]
    except ValueError as error:  # the loaders' own messages name the file
        raise UserError(str(error)) from None
    return content


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
