"""An asynchronous client that pays for each question once: cached, retried, re-asked until it fits a schema.

The cache is keyed by the SHA-256 of the full request and holds every paid reply, also invalid ones, so a run
that was killed goes on without paying again.  Its files hold no key.
"""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_eagle.eagle_video.files import digest
from megatron_eagle.eagle_video.schema import example, parse_answer
from megatron_eagle.eagle_video.transport import Endpoint, Reply, Retry, post
from megatron_eagle.eagle_video.usage import Usage, estimated_tokens
from megatron_eagle.errors import UserError
from megatron_eagle.files import from_record, write_whole
from megatron_eagle.problems import Problem

_CORRECTION = (
    "That answer cannot be used: {problem}. Answer again, with nothing but the JSON that was asked for."
)


@dataclass(frozen=True)
class Answer:
    """A value that fits the schema and the key of the request that brought it."""

    value: Any
    key: str


class Asks(Protocol):
    """What the pipeline needs of a client; `DryRun` has it too."""

    usage: Usage
    model: str

    async def ask(
        self, content: str | list[Any], schema: dict[str, Any], *, max_tokens: int = 1024
    ) -> Answer:
        """The answer to one user message (text, or OpenAI content parts) as JSON that fits the schema."""
        ...


class Client:
    """Asks an endpoint.  Use as a context manager; all `ask` calls must come from one event loop."""

    def __init__(self, endpoint: Endpoint, cache: Path, *, reasks: int = 2, temperature: float = 0.0) -> None:
        self.endpoint = endpoint
        self.model = endpoint.model
        self.usage = Usage(endpoint.input_price, endpoint.output_price)
        self._cache = cache
        self._reasks = reasks
        self._temperature = temperature
        self._pool = ThreadPoolExecutor(endpoint.concurrency)
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._under_way: dict[str, asyncio.Task[Reply]] = {}
        self._next_start = 0.0  # of time.monotonic()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    async def ask(
        self, content: str | list[Any], schema: dict[str, Any], *, max_tokens: int = 1024
    ) -> Answer:
        """See `Asks`.

        Raises:
            Problem: all tries are used up.
            UserError: the endpoint is wrong.
        """
        messages = [{"role": "user", "content": content}]
        for _ in range(self._reasks + 1):
            request = _request(self.model, messages, self._temperature, max_tokens)
            key = digest([self.endpoint.url, request])
            reply = await self._reply(key, request)
            try:
                if reply.truncated:
                    raise ValueError(f"it is longer than {max_tokens} tokens")
                return Answer(parse_answer(reply.text, schema), key)
            except ValueError as error:
                self.usage.invalid += 1
                problem = str(error)
            messages = [
                *messages[:1],
                {"role": "assistant", "content": reply.text},
                {"role": "user", "content": _CORRECTION.format(problem=problem)},
            ]
        raise Problem("no valid answer", f"{self._reasks + 1} times; the last time {problem}")

    async def _reply(self, key: str, request: dict[str, Any]) -> Reply:
        path = self._cache / key[:2] / f"{key}.json"
        if (stored := _read_reply(path)) is not None:
            self.usage.cached += 1
            return stored
        if key not in self._under_way:  # two that ask the same at once pay once
            self._under_way[key] = asyncio.create_task(self._fetch(path, request))
        return await self._under_way[key]

    async def _fetch(self, path: Path, request: dict[str, Any]) -> Reply:
        wait = self.endpoint.first_wait
        for attempt in range(1, self.endpoint.attempts + 1):
            try:
                async with self._slots:
                    await self._turn(request)
                    loop = asyncio.get_running_loop()
                    reply = await loop.run_in_executor(self._pool, self._pay, path, request)
                break
            except Retry as failure:
                if attempt == self.endpoint.attempts:
                    raise Problem("endpoint failed", f"{attempt} attempts; the last: {failure}") from None
                self.usage.retries += 1
                if failure.after is not None:  # what one request is told holds for all
                    self._next_start = max(self._next_start, time.monotonic() + failure.after)
                else:
                    # Jitter: requests that failed together do not come back together.
                    await asyncio.sleep(wait * random.uniform(0.5, 1.0))
                wait = min(2 * wait, self.endpoint.longest_wait)
        self.usage.requests += 1
        self.usage.input_tokens += reply.input_tokens
        self.usage.output_tokens += reply.output_tokens
        return reply

    def _pay(self, path: Path, request: dict[str, Any]) -> Reply:
        """Post and store in one thread: a run that is interrupted meanwhile still keeps what it paid for."""
        reply = post(self.endpoint, request)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(asdict(reply), ensure_ascii=False))
        except OSError as error:
            raise UserError(
                f"{self._cache}: cannot keep what was paid for: {error.strerror}; when that is mended start "
                "again, earlier answers are kept"
            ) from None
        return reply

    async def _turn(self, request: dict[str, Any]) -> None:
        """Wait until the limits allow this request to start.

        Limits count starts evenly: after a request of t tokens the next one waits for t / tokens_per_minute
        minutes. Endpoints count an answer's whole limit of tokens.
        """
        tokens = sum(estimated_tokens(m["content"]) for m in request["messages"]) + request["max_tokens"]
        limits = (1, self.endpoint.requests_per_minute), (tokens, self.endpoint.tokens_per_minute)
        while (delay := self._next_start - time.monotonic()) > 0:
            await asyncio.sleep(delay)
        pause = max((60 * amount / limit for amount, limit in limits if limit), default=0)
        self._next_start = time.monotonic() + pause


class DryRun:
    """Counts what a run would ask, without asking: an estimate of tokens from text and pictures.

    Messages count as in `usage.estimated_tokens`, an answer as half of its limit.  Every first answer counts
    as good, and none as cached.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.usage = Usage(endpoint.input_price, endpoint.output_price)
        self.model = endpoint.model

    async def ask(
        self, content: str | list[Any], schema: dict[str, Any], *, max_tokens: int = 1024
    ) -> Answer:
        """See `Asks`: an example of the schema."""
        self.usage.requests += 1
        self.usage.output_tokens += max_tokens // 2
        self.usage.input_tokens += estimated_tokens(content)
        return Answer(example(schema), "")


async def for_each(
    items: list[Any], work: Callable[[Any], Awaitable[list[Any]]], at_once: int
) -> list[list[Any]]:
    """`work` on every item, at most `at_once` at a time; results in the order of the items.

    The first exception ends all of it.
    """
    slots = asyncio.Semaphore(at_once)

    async def limited(item: Any) -> list[Any]:
        async with slots:
            return await work(item)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(limited(item)) for item in items]
    return [task.result() for task in tasks]


def _request(model: str, messages: list[Any], temperature: float, max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": messages,
        "temperature": temperature,
        "max_tokens": max_tokens,
        "response_format": {"type": "json_object"},
    }


def _read_reply(path: Path) -> Reply | None:
    try:
        return from_record(Reply, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):
        return None
