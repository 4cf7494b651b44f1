"""`GET /v1/export`: how the served export cuts pictures, for clients that draw pages of the right size.

Its answer also tells them that this plugin serves: videos may be sent as files, tiles asked for.
`vllm serve --middleware` takes its class.
"""

import json
from pathlib import Path
from typing import Any

PATH = "/v1/export"


class ExportSettings:
    """An ASGI application around vLLM's."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer `PATH`, and pass everything else on."""
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._app(scope, receive, send)
            return
        body = json.dumps(_settings(Path(scope["app"].state.vllm_config.model_config.model))).encode()
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": body})


_HEADERS = [(b"content-type", b"application/json")]


def _settings(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    return {
        "tile_size": settings["size"]["height"],
        "max_tiles": settings["max_dynamic_tiles"],
        "tiling": settings["tiling"],
    }
