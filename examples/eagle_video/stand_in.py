"""A small endpoint on this machine that speaks the chat completions protocol, and answers without any model.

It stands in for a model where none is at hand: the pipeline's steps run, their samples are worth nothing.
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers every chat completion with `answer(request)`; listens on 127.0.0.1, port 0 is any free one."""

    daemon_threads = True

    def __init__(
        self,
        answer: Callable[[dict], str],
        port: int = 0,
        handler: type[BaseHTTPRequestHandler] | None = None,
    ) -> None:
        super().__init__(("127.0.0.1", port), handler or Handler)
        self.answer = answer

    @property
    def url(self) -> str:
        """Up to /v1."""
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    """One request, one answer."""

    def do_POST(self) -> None:
        """Answer it."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.complete(self.server.answer(request))

    def complete(self, text: str, finish: str = "stop") -> None:
        """Send `text` as a chat completion."""
        body = {"choices": [{"message": {"content": text}, "finish_reason": finish}]}
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 10}
        self.send(200, json.dumps(body).encode(), {})

    def send(self, code: int, body: bytes, headers: dict[str, str], missing: int = 0) -> None:
        """Send a response; `missing` more bytes are announced than come."""
        try:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(body) + missing)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # the client gave up waiting
            pass

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """The server, running."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(request: dict) -> str:
    """What the pipeline's prompts ask for, in their form, about nothing that is seen."""
    content = request["messages"][0]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    if '{"caption"' in text:
        return json.dumps({"caption": f"A stand-in's words on {len(content) - 1} frames."})
    if '{"anchor"' in text:
        return json.dumps({"anchor": "While a sound is heard"})
    if '{"leaks"' in text:
        return json.dumps({"leaks": False})
    kinds = re.findall(r"^- ([^:]+):", text, re.MULTILINE)
    if kinds:
        pairs = [{"type": kind, "question": f"Which {kind}?", "answer": f"Some {kind}."} for kind in kinds]
    else:
        pairs = [{"question": "What comes first?", "answer": "The beginning."}]
    return json.dumps({"qa": pairs})
