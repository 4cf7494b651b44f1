"""The demo page's server: uploads, what a model sees of them, and one streamed answer at a time.

Uploads lie in a temporary folder under names made here, and are deleted with it. Answers stream as lines of
JSON: {"prompt": ...} once, {"text": ...} often, and last {"done"}, {"stopped"} or {"error": ...}.
"""

import asyncio
import json
import logging
import re
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.middleware.trustedhost import TrustedHostMiddleware

from megatron_eagle.errors import UserError
from megatron_eagle.inference.demo_media import Shown, Viewer, request_of
from megatron_eagle.inference.generate import Answers, ExportedModel, first_line

MAX_UPLOADS = 32  # kept; the oldest goes
_PAGE = Path(__file__).with_name("demo.html")
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; frame-ancestors 'none'"
)
_log = logging.getLogger("uvicorn.error")

LimitedText = Annotated[str, Field(max_length=100_000)]


class DemoQuestion(BaseModel):
    """What the page asks: ids of uploads, the question, earlier questions and answers."""

    prompt: LimitedText
    media: Annotated[list[str], Field(max_length=MAX_UPLOADS)] = []
    turns: Annotated[list[tuple[LimitedText, LimitedText]], Field(max_length=64)] = []


class _Stopped(Exception):
    """Ends an answer from inside."""


class Demo:
    """Uploads and the one answer that is being made."""

    def __init__(self, model: Answers, viewer: Viewer, about: dict[str, Any]) -> None:
        self.model, self.viewer, self.about = model, viewer, about
        self.uploads: dict[str, tuple[Path, Shown]] = {}
        self.folder: Path | None = None  # while the server runs
        self._answering = threading.Lock()
        self._stop = threading.Event()

    async def receive(self, request: Request) -> tuple[str, Shown]:
        """Keep the body of a request, if it is within the limits.

        Raises:
            UserError: it is over the limit or empty, or `Viewer.look` refuses it.
        """
        megabytes = self.viewer.limits.megabytes
        name, size = uuid.uuid4().hex, 0
        assert self.folder is not None, "the server runs"
        path = self.folder / name
        try:
            with path.open("wb") as file:
                async for part in request.stream():
                    size += len(part)
                    if size > megabytes * 2**20:
                        raise UserError(f"the file has more than {megabytes} MB")
                    file.write(part)
            if not size:
                raise UserError("the file is empty")
            shown = await run_in_threadpool(self.viewer.look, path)
        except BaseException:
            path.unlink()
            raise
        self.uploads[name] = path, shown
        while len(self.uploads) > MAX_UPLOADS:
            self.forget(next(iter(self.uploads)))
        return name, shown

    def forget(self, name: str) -> None:
        """Delete an upload, if it is there."""
        if name in self.uploads:
            self.uploads.pop(name)[0].unlink()

    def stop(self) -> None:
        """End the running answer at its next token."""
        self._stop.set()

    async def answer(self, question: DemoQuestion) -> AsyncIterator[dict[str, Any]]:
        """Events of one answer; leaving the iterator stops it."""
        if not self._answering.acquire(blocking=False):
            yield {"error": "another answer is being made: wait for its end, or stop it"}
            return
        self._stop = stopped = threading.Event()
        events: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        thread = threading.Thread(
            target=self._work,
            args=(question, stopped, lambda event: loop.call_soon_threadsafe(events.put_nowait, event)),
            daemon=True,  # a model that computes does not keep the server from ending
        )
        thread.start()
        try:
            while True:
                event = await events.get()
                yield event
                if "text" not in event and "prompt" not in event:
                    return
        finally:
            stopped.set()

    def _work(
        self, question: DemoQuestion, stopped: threading.Event, emit: Callable[[dict[str, Any]], None]
    ) -> None:
        def check() -> None:
            if stopped.is_set():
                raise _Stopped

        def on_text(text: str) -> None:
            check()
            if text:
                emit({"text": text})

        def on_prompt(visual: int, tokens: int) -> None:
            check()
            emit({"prompt": {"visual": visual, "text": tokens - visual}})

        try:
            missing = [name for name in question.media if name not in self.uploads]
            if missing:
                raise UserError("an upload is gone: upload it again")
            media = [
                (shown.kind, str(path)) for path, shown in (self.uploads[name] for name in question.media)
            ]
            request = request_of(question.prompt, media, tuple(question.turns))
            counted = {"on_prompt": on_prompt} if isinstance(self.model, ExportedModel) else {}
            self.model.answer(request, self.viewer.sampling, on_text=on_text, **counted)
            event: dict[str, Any] = {"done": True}
        except _Stopped:
            event = {"stopped": True}
        except UserError as error:
            event = {"error": self.clean(str(error))}
        except Exception as error:  # out of memory, for one: the page says so, the server goes on
            _log.exception("an answer failed")
            event = {"error": self.clean(f"{type(error).__name__}: {first_line(error)}")}
        self._answering.release()
        try:
            emit(event)
        except RuntimeError:  # the server has ended
            _log.info("an answer ended after the server")

    def clean(self, message: str) -> str:
        """A message without the paths of uploads."""
        return re.sub(rf"{re.escape(str(self.folder))}/[0-9a-f]*", "the file", message)


def make_app(demo: Demo, local: bool) -> FastAPI:
    """The page and its requests; `local`: only under this machine's own names."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with TemporaryDirectory(prefix="eagle-demo-", ignore_cleanup_errors=True) as folder:
            demo.folder = Path(folder)
            yield
            demo.stop()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _refuse_strangers(app, local)
    _answer_refusals(app, demo)

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": _POLICY})

    @app.get("/about")
    async def about() -> dict[str, Any]:
        limits = demo.viewer.limits
        return {**demo.about, "limits": str(limits), "megabytes": limits.megabytes}

    @app.post("/media")
    async def upload(request: Request) -> dict[str, Any]:
        name, shown = await demo.receive(request)
        return {"id": name, **asdict(shown)}

    @app.delete("/media/{name}")
    async def remove(name: str) -> dict[str, Any]:
        demo.forget(name)
        return {}

    @app.post("/ask")
    async def ask(question: DemoQuestion) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            async for event in demo.answer(question):
                yield json.dumps(event) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    @app.post("/stop")
    async def stop() -> dict[str, Any]:
        demo.stop()
        return {}

    return app


def _refuse_strangers(app: FastAPI, local: bool) -> None:
    """Other sites' pages get nothing; `local`: nor does who comes by another name than this machine's own."""
    if local:  # a name of somebody else's that leads here is not ours
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])

    @app.middleware("http")
    async def own_page_only(request: Request, call_next: Callable[..., Any]) -> Response:
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            return JSONResponse({"error": "asked by another site"}, 403)
        response: Response = await call_next(request)
        return response


def _answer_refusals(app: FastAPI, demo: Demo) -> None:
    """What is wrong with a request is one line of JSON."""

    @app.exception_handler(UserError)
    async def refused(request: Request, error: UserError) -> Response:
        return JSONResponse({"error": demo.clean(str(error))}, 400)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"error": f"the question is malformed: {error.errors()[0]['msg']}"}, 400)
