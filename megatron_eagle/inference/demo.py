"""The demo page's server: uploads, what a model sees of them, and one streamed answer at a time.

Uploads lie in a temporary folder under names made here, and are deleted with it. A question is refused with
one line, {"error": ...}, or its answer streams as lines of JSON: {"answer": its name}, {"prompt": tokens} if
they are known, {"text": ...} often, and last {"done"}, {"stopped"} or {"error": ...}.
"""

import asyncio
import base64
import hashlib
import json
import logging
import re
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
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
from megatron_eagle.inference.demo_media import Seen, Shown, Viewer, request_of
from megatron_eagle.inference.generate import Answers, first_line
from megatron_eagle.inference.generate import Request as Question

MAX_UPLOADS = 32  # kept; the oldest goes
_PAGE = Path(__file__).with_name("demo.html")
# Nothing from outside, and no script but the page's own: not what a file's name or an answer may hold.
_POLICY = (
    "default-src 'none'; script-src 'sha256-{}'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SCRIPT = re.compile("<script>(.*)</script>", re.DOTALL)
_log = logging.getLogger("uvicorn.error")

LimitedText = Annotated[str, Field(max_length=100_000)]


class DemoQuestion(BaseModel):
    """What the page asks: ids of uploads, the question, earlier questions and answers."""

    prompt: LimitedText
    media: Annotated[list[str], Field(max_length=MAX_UPLOADS)] = []
    turns: Annotated[list[tuple[LimitedText, LimitedText]], Field(max_length=64)] = []


class Busy(UserError):
    """Another answer is being made."""


class _Stopped(Exception):
    """Ends an answer from inside."""


class _Answer:
    """An answer that is being made; who knows its name may stop it."""

    def __init__(self, counted: tuple[int, int] | None) -> None:
        self.name, self.counted = uuid.uuid4().hex, counted
        self._stopped = threading.Event()
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def stop(self) -> None:
        """End it at its next token."""
        self._stopped.set()

    def check(self) -> None:
        """For the thread that makes it.

        Raises:
            _Stopped: it is not wanted any more.
        """
        if self._stopped.is_set():
            raise _Stopped

    def emit(self, event: dict[str, Any]) -> None:
        """Send an event from the thread that makes it."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            _log.info("an answer went on after the server's end")

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """All events of it; leaving the iterator stops it."""
        try:
            yield {"answer": self.name}
            if self.counted:
                yield {"prompt": dict(zip(("visual", "text"), self.counted, strict=True))}
            while True:
                event = await self._events.get()
                yield event
                if "text" not in event:
                    return
        finally:
            self.stop()


class Demo:
    """Uploads and the one answer that is being made.

    Args:
        about: what the page shows of the model.
        prompt_limit: tokens; longer prompts are refused. None: the model's own word counts.
    """

    def __init__(
        self, model: Answers, viewer: Viewer, about: dict[str, Any], prompt_limit: int | None = None
    ) -> None:
        self.model, self.viewer, self.about, self.prompt_limit = model, viewer, about, prompt_limit
        self.uploads: dict[str, tuple[Path, Seen]] = {}
        self.folder: Path | None = None  # while the server runs
        # A picture takes many times its file: one is decoded at a time. Uploads all in one thread, since each
        # thread's heap keeps what a decoder gives back.
        self._decoding = threading.Lock()
        self._reader = ThreadPoolExecutor(1)
        self._answering = threading.Lock()
        self._running: _Answer | None = None

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
            seen = await asyncio.get_running_loop().run_in_executor(self._reader, self._look, path)
        except BaseException:
            path.unlink()
            raise
        self.uploads[name] = path, seen
        while len(self.uploads) > MAX_UPLOADS:
            self.forget(next(iter(self.uploads)))
        return name, seen.shown

    def _look(self, path: Path) -> Seen:
        with self._decoding:
            try:
                return self.viewer.look(path)
            except UserError:
                raise
            except Exception as error:  # a decoder's own, or out of memory: the page says so
                _log.exception("an upload failed")
                raise UserError(f"the file cannot be read: {_in_a_line(error)}") from None

    def forget(self, name: str) -> None:
        """Delete an upload, if it is there."""
        if name in self.uploads:
            self.uploads.pop(name)[0].unlink()

    def stop(self, name: str | None = None) -> None:
        """End the answer of this name (None: any) at its next token, if it is being made."""
        answer = self._running
        if answer is not None and name in (None, answer.name):
            answer.stop()

    def close(self) -> None:
        """End with the server: the answer at its next token, and uploads that wait to be read."""
        self.stop()
        self._reader.shutdown(wait=False, cancel_futures=True)

    async def ask(self, question: DemoQuestion) -> _Answer:
        """Begin an answer.

        Raises:
            UserError: an upload is gone, the prompt does not fit it, or is longer than the limit.
            Busy: another one is being made.
        """
        missing = [name for name in question.media if name not in self.uploads]
        if missing:
            raise UserError("an upload is gone: remove it and upload it again")
        uploads = [self.uploads[name] for name in question.media]
        request = request_of(question.prompt, uploads, tuple(question.turns))
        if not self._answering.acquire(blocking=False):
            raise Busy("another answer is being made: ask again when it has ended")
        try:  # no other answer uses the tokenizer, which is not for two threads
            counted = await run_in_threadpool(self._counted, [seen for _, seen in uploads], request)
            self._running = answer = _Answer(counted)
            # A model that computes does not keep the server from ending.
            threading.Thread(target=self._work, args=(request, answer), daemon=True).start()
        except BaseException:
            self._answering.release()
            raise
        return answer

    def _counted(self, seen: list[Seen], request: Question) -> tuple[int, int] | None:
        self.viewer.check_memory("all uploads", self.viewer.held(seen))
        counted = self.viewer.count(seen, request)
        if counted and self.prompt_limit and sum(counted) > self.prompt_limit:
            raise UserError(
                f"the prompt has {sum(counted):,} tokens, {counted[0]:,} of them visual, and the limit is "
                f"{self.prompt_limit:,}: remove an upload, or begin a new chat"
            )
        return counted

    def _work(self, request: Question, answer: _Answer) -> None:
        def on_text(text: str) -> None:
            answer.check()
            if text:
                answer.emit({"text": text})

        def on_read() -> None:
            reading.close()
            answer.check()

        try:
            with ExitStack() as reading:
                reading.enter_context(self._decoding)
                answer.check()
                self.model.answer(request, self.viewer.sampling, on_text=on_text, on_read=on_read)
            event: dict[str, Any] = {"done": True}
        except _Stopped:
            event = {"stopped": True}
        except UserError as error:
            event = {"error": self.clean(str(error))}
        except Exception as error:  # out of memory, for one: the page says so, the server goes on
            _log.exception("an answer failed")
            event = {"error": self.clean(_in_a_line(error))}
        self._running = None
        self._answering.release()
        answer.emit(event)

    def clean(self, message: str) -> str:
        """A message without the paths of uploads."""
        return re.sub(rf"{re.escape(str(self.folder))}/[0-9a-f]*", "the file", message)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def make_app(demo: Demo, local: bool) -> FastAPI:
    """The page and its requests; `local`: only under this machine's own names."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with TemporaryDirectory(prefix="eagle-demo-", ignore_cleanup_errors=True) as folder:
            demo.folder = Path(folder)
            yield
            demo.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _refuse_strangers(app, local)
    _answer_refusals(app, demo)

    html = _PAGE.read_text(encoding="utf-8")
    digest = hashlib.sha256(_SCRIPT.findall(html)[0].encode()).digest()
    policy = {"Content-Security-Policy": _POLICY.format(base64.b64encode(digest).decode())}

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=policy)

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
        answer = await demo.ask(question)

        async def lines() -> AsyncIterator[str]:
            async for event in answer.events():
                yield json.dumps(event) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    @app.post("/stop/{name}")
    async def stop(name: str) -> dict[str, Any]:
        demo.stop(name)
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
        return JSONResponse({"error": demo.clean(str(error))}, 409 if isinstance(error, Busy) else 400)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "too_long" and first["loc"][1:] == ("turns",):
            return JSONResponse({"error": "the conversation has too many turns: begin a new chat"}, 400)
        where = ".".join(map(str, first["loc"][1:])) or "body"
        return JSONResponse({"error": f"the question is malformed: {where}: {first['msg']}"}, 400)
