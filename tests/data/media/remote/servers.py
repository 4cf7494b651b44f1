"""Servers for the tests of remote media: one that can be told to fail, and small stand-ins for stores."""

import hashlib
import http.client
import json
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

SLOW_SECONDS = 1.5


@dataclass
class Answer:
    """What a server says."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Server:
    """A server of this machine that counts what is asked of it, and fails as `faults` say.

    `faults` are those of the next answers with a body, one each: "503", "404", "403", "cut" (in the middle),
    "long" (more bytes are promised than come), "slow" (nothing for a while), "none" (no fault).
    """

    url: str = ""
    connections: int = 0
    requests: list[str] = field(default_factory=list)
    faults: deque[str] = field(default_factory=deque)

    def answer(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        """What it says without a fault."""
        raise NotImplementedError

    def scheme(self) -> str:
        """http, or https where it has a certificate."""
        return "https" if self.certificate() else "http"

    def certificate(self) -> tuple[str, str] | None:
        """Files of its certificate and key."""
        return None

    @contextmanager
    def running(self) -> Iterator["Server"]:
        """Answers meanwhile."""
        server = self

        class Listener(ThreadingHTTPServer):
            daemon_threads = True

            def get_request(self) -> tuple[socket.socket, object]:
                request = super().get_request()
                server.connections += 1
                return request

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # who asked has gone

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def respond(self) -> None:
                server.requests.append(f"{self.command} {self.path}")
                answer = server.answer(self.command, self.path, dict(self.headers.items()))
                fault = "none"
                if self.command == "GET" and server.faults:
                    fault = server.faults.popleft()
                if fault.isdigit():
                    answer = Answer(int(fault), b"<html>not a picture</html>")
                if fault == "slow":
                    time.sleep(SLOW_SECONDS)
                self.send_response(answer.status)
                length = len(answer.body) + (7 if fault == "long" else 0)
                for name, value in {"Content-Length": str(length), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                body = answer.body[: len(answer.body) // 2] if fault == "cut" else answer.body
                if self.command != "HEAD":
                    self.wfile.write(body)
                if fault in ("cut", "long"):
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True

            do_GET = do_HEAD = do_POST = do_PUT = respond

        listener = Listener(("127.0.0.1", 0), Handler)
        if certificate := self.certificate():
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            listener.socket = context.wrap_socket(listener.socket, server_side=True)
        self.url = f"{self.scheme()}://localhost:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            listener.shutdown()
            listener.server_close()
            thread.join()


@dataclass
class Proxy(Server):
    """Passes everything on to another server."""

    behind: str = ""

    def answer(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        """See `Server`."""
        connection = http.client.HTTPConnection(urlsplit(self.behind).netloc, timeout=30)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
            dropped = ("connection", "transfer-encoding", "server", "date")
            kept = {name: value for name, value in answer.getheaders() if name.lower() not in dropped}
            if method != "HEAD":
                kept = {name: value for name, value in kept.items() if name.lower() != "content-length"}
            return Answer(answer.status, body, kept)
        finally:
            connection.close()


@dataclass
class Web(Server):
    """Files by their paths, and redirects; with a certificate it speaks TLS."""

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    files_of_certificate: tuple[str, str] | None = None
    knows_head: bool = True
    knows_tags: bool = True

    def certificate(self) -> tuple[str, str] | None:
        """See `Server`."""
        return self.files_of_certificate

    def answer(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        """See `Server`."""
        if method == "HEAD" and not self.knows_head:
            return Answer(405)
        if path in self.redirects:
            return Answer(302, b"", {"Location": self.redirects[path]})
        content = self.files.get(path)
        if content is None:
            return Answer(404)
        tag = {"ETag": f'"{hashlib.md5(content).hexdigest()}"'} if self.knows_tags else {}
        return Answer(200, content, tag | ({"Content-Length": str(len(content))} if method == "HEAD" else {}))


@dataclass
class Google(Server):
    """As much of Google Cloud Storage's JSON API as reading objects takes."""

    objects: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    """Generation and content, by `bucket/name`."""

    def answer(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        """See `Server`."""
        parts = urlsplit(path)
        bucket, _, name = parts.path.partition("/b/")[2].partition("/o/")
        found = self.objects.get(f"{bucket}/{unquote(name)}")
        query = parse_qs(parts.query)
        if found is None or query.get("generation", [str(found[0])]) != [str(found[0])]:
            return Answer(404, b"{}")
        generation, content = found
        if query.get("alt") != ["media"]:
            described = {"bucket": bucket, "name": unquote(name), "size": str(len(content))}
            return Answer(200, json.dumps({**described, "generation": str(generation)}).encode())
        start, end = (int(n) for n in headers["Range"].removeprefix("bytes=").split("-"))
        return Answer(206, content[start : end + 1])


@dataclass
class Hub(Server):
    """As much of the hub as reading files of a data set takes: small ones itself, large ones elsewhere."""

    small: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    """Content, and the address that it is to be had from."""

    def answer(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        """See `Server`."""
        if not path.startswith("/datasets/owner/name/resolve/main/"):
            return Answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        name = unquote(path.split("/main/", 1)[1])
        commit = {"X-Repo-Commit": "0" * 40}
        if name in self.small:
            content = self.small[name]
            tag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            return Answer(200, content, commit | {"ETag": f'"{tag}"'})
        if name in self.large:
            content, elsewhere = self.large[name]
            tag = hashlib.sha256(content).hexdigest()
            linked = {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(content)), "Location": elsewhere}
            return Answer(302, b"", commit | linked)
        return Answer(404, b"", commit | {"X-Error-Code": "EntryNotFound"})
