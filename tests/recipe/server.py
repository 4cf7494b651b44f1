"""A local endpoint that speaks the chat completions protocol and misbehaves on demand."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers with `answer(request)`, unless `faults` has something to do first.

    A fault: ("status", code, headers), ("sleep", seconds), ("body", bytes), ("cut", bytes), or ("text", str).
    """

    daemon_threads = True

    def __init__(self, answer: Callable[[dict], str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.faults: list[tuple] = []
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Up to /v1."""
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.headers.append(dict(self.headers))
            server.times.append(time.monotonic())
            fault = server.faults.pop(0) if server.faults else None
        finish, text = "stop", None
        if fault and fault[0] == "status":
            echo = json.dumps({"error": f"no: {self.headers.get('Authorization')}"}).encode()
            return self._send(fault[1], echo, fault[2])
        if fault and fault[0] == "sleep":
            time.sleep(fault[1])
        elif fault and fault[0] in ("body", "cut"):
            return self._send(200, fault[1], {}, extra=50 * (fault[0] == "cut"))
        elif fault and fault[0] == "text":
            text = fault[1]
        elif fault and fault[0] == "length":
            finish, text = "length", fault[1]
        text = server.answer(request) if text is None else text
        body = {"choices": [{"message": {"content": text}, "finish_reason": finish}]}
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
        return self._send(200, json.dumps(body).encode(), {})

    def _send(self, code: int, body: bytes, headers: dict, extra: int = 0) -> None:
        try:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body) + extra)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client gave up waiting
            pass

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(answer: Callable[[dict], str]) -> Iterator[Server]:
    """A running server."""
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
