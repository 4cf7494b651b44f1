"""What a client may ask of the served export; `vllm serve --middleware` takes the class.

`/v1/export`              how it cuts pictures, for clients that draw pages of the right size; it tells them
                          too that this plugin serves: videos may be sent as files, tiles asked for
`/v1/export/files`        SHA-256 of its files
`/v1/export/certificate`  what its certificate says of them, in a line
`/v1/export/seen/NUMBER`  what was made of the media of the request that bore this number (`seen`), once
"""

import asyncio
import json
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .certificate import certificate_line, file_digests
from .seen import SEEN

PATH = "/v1/export"


class ExportSettings:
    """An ASGI application around vLLM's."""

    def __init__(self, app: Any) -> None:
        self._app = app
        # Of weights too, once for each export (`reload` serves several, one after the other).
        self._digests = lru_cache(maxsize=1)(lambda folder, written: file_digests(folder))  # noqa: ARG005
        self._hashing = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer `PATH` and what is below it, and pass everything else on."""
        if scope["type"] != "http" or not f"{scope['path']}/".startswith(f"{PATH}/"):
            await self._app(scope, receive, send)
            return
        reply = await self._reply(
            scope["path"].removeprefix(PATH), scope["app"].state.vllm_config.model_config
        )
        body = json.dumps({"error": {"message": "nothing here"}} if reply is None else reply).encode()
        status = 404 if reply is None else 200
        await send({"type": "http.response.start", "status": status, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": body})

    async def _reply(self, below: str, model_config: Any) -> Any:
        """None: there is no such thing."""
        folder = Path(model_config.model)
        if below == "":
            dtype = str(model_config.dtype).removeprefix("torch.")
            return _settings(model_config) | {"dtype": dtype, "vllm": _version()}
        if below in ("/files", "/certificate"):
            async with self._hashing:
                written = (folder / "config.json").stat().st_mtime_ns
                digests = await asyncio.to_thread(self._digests, folder, written)
            return digests if below == "/files" else {"certificate": certificate_line(folder, digests)}
        media = SEEN.take(below.removeprefix("/seen/"))
        return None if media is None else {"media": media}


_HEADERS = [(b"content-type", b"application/json")]


def _version() -> str | None:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None


def _settings(model: Any) -> dict[str, Any]:
    """Of vLLM's `model_config`: the export's, or what the server was started with."""
    settings = json.loads((Path(model.model) / "preprocessor_config.json").read_text(encoding="utf-8"))
    asked = model.multimodal_config.mm_processor_kwargs or {}
    settings |= {**asked, **(asked.get("images_kwargs") or {})}
    return {
        "tile_size": settings["size"]["height"],
        "max_tiles": settings["max_dynamic_tiles"],
        "tiling": settings["tiling"],
    }
