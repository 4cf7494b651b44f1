"""The example's endpoint, which here keeps what it is asked and misbehaves on demand."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from tests.eagle_video.helpers import example

stand_in = example("stand_in")


class Server(stand_in.Server):
    """Answers with `answer(request)`, unless `faults` has something to do first.

    A fault: ("status", code, headers), ("sleep", seconds), ("body", bytes), ("cut", bytes), ("text", str), or
    ("length", str).
    """

    def __init__(self, answer: Callable[[dict], str]) -> None:
        super().__init__(answer, handler=_Handler)
        self.faults: list[tuple] = []
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.lock = threading.Lock()


class _Handler(stand_in.Handler):
    def do_POST(self) -> None:
        server: Server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.headers.append(dict(self.headers))
            server.times.append(time.monotonic())
            fault = server.faults.pop(0) if server.faults else None
        kind = fault[0] if fault else None
        if kind == "status":
            echo = json.dumps({"error": f"no: {self.headers.get('Authorization')}"}).encode()
            return self.send(fault[1], echo, fault[2])
        if kind in ("body", "cut"):
            return self.send(200, fault[1], {}, missing=50 * (kind == "cut"))
        if kind in ("text", "length"):
            return self.complete(fault[1], "length" if kind == "length" else "stop")
        if kind == "sleep":
            time.sleep(fault[1])
        return self.complete(server.answer(request))


def serving(answer: Callable[[dict], str]) -> AbstractContextManager[Server]:
    """A running server."""
    return stand_in.serving(Server(answer))
