"""New weights for a server that runs; `tools/serve_vllm.sh --follow` starts vLLM with this middleware, and
its workers with `reload_worker`.

`GET  /v1/export/weights`   which iteration is served, and how often weights were loaded since the start
`POST /v1/export/weights`   load the export's files again, for a newer checkpoint has been exported there

A request is answered by one set of weights from its first token to its last: new ones wait at the door until
those inside are answered and the weights are there. Nothing that was computed by the old ones is kept: vLLM's
prefix, encoder and media caches are emptied. Only a client on this machine that knows the secret of the
environment's `EAGLE_RELOAD_SECRET` may load, and only from the folder that is served.
"""

import asyncio
import hmac
import ipaddress
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

WEIGHTS_PATH = "/v1/export/weights"
SECRET = "EAGLE_RELOAD_SECRET"
# The export's own record, beside the weights (`convert.to_hf`).
_RECORD = "megatron_eagle_export.json"


class Reloading:
    """An ASGI application around vLLM's."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._door = _Door()
        self._loads = 0
        self._iteration: int | None = None
        self._broken: str | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer `WEIGHTS_PATH`; let what may ask the model through the door (by other paths than `/v1/`,
        too); pass everything else on.
        """
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif scope["path"] == WEIGHTS_PATH:
            status, reply = await self._control(scope)
            await _send(send, status, reply)
        elif scope["method"] == "POST":
            async with self._door.inside():
                if self._broken:
                    await _send(send, 503, {"error": {"message": self._broken}})
                else:
                    await self._app(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _control(self, scope: Any) -> tuple[int, dict[str, Any]]:
        state = scope["app"].state
        folder = Path(state.vllm_config.model_config.model)
        if self._iteration is None and not self._loads:
            self._iteration = _iteration(folder)
        if scope["method"] == "POST":
            if not _allowed(scope):
                return 403, {"error": {"message": "weights are loaded by this machine's --follow alone"}}
            async with self._door.closed():
                await self._load(state.engine_client, folder)
        if self._broken:
            return 500, {"error": {"message": self._broken}}
        return 200, {"iteration": self._iteration, "loads": self._loads}

    async def _load(self, engine: Any, folder: Path) -> None:
        """Nobody is inside. An error on the way leaves a model of two halves, which answers nobody."""
        try:
            # "wait": other API processes of this server may have requests in the engine.
            await engine.pause_generation(mode="wait", clear_cache=True)
            await engine.collective_rpc("load_export", args=(str(folder),))
            await engine.reset_encoder_cache()
            await engine.reset_mm_cache()
            await engine.reset_prefix_cache()
            await engine.resume_generation()
        except Exception as error:  # whatever vLLM raises
            reason = str(error).partition("\n")[0]
            self._broken = f"{folder}: its weights could not be loaded: {reason}; start the server again"
            return
        self._broken, self._iteration, self._loads = None, _iteration(folder), self._loads + 1


class _Door:
    """Many are inside, or it is closed. Who comes while it is closed, or closing, waits."""

    def __init__(self) -> None:
        self._inside = 0
        self._closing = asyncio.Lock()
        self._open, self._empty = asyncio.Event(), asyncio.Event()
        self._open.set()
        self._empty.set()

    @asynccontextmanager
    async def inside(self) -> AsyncIterator[None]:
        await self._open.wait()
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    @asynccontextmanager
    async def closed(self) -> AsyncIterator[None]:
        async with self._closing:
            self._open.clear()
            try:
                await self._empty.wait()
                yield
            finally:
                self._open.set()


def _iteration(folder: Path) -> int | None:
    try:
        found = json.loads((folder / _RECORD).read_text(encoding="utf-8")).get("iteration")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, int) else None


def _allowed(scope: Any) -> bool:
    """A client of this machine (a proxy hands on another's address) with the secret."""
    secret, given = os.environ.get(SECRET, ""), dict(scope["headers"]).get(b"authorization", b"")
    host, own = ((scope.get(end) or ("",))[0] for end in ("client", "server"))
    try:
        near = ipaddress.ip_address(host).is_loopback or host == own
    except ValueError:
        near = False
    return near and bool(secret) and hmac.compare_digest(given, f"Bearer {secret}".encode())


async def _send(send: Any, status: int, reply: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(reply).encode()})
