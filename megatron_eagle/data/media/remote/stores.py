"""What is asked of stores and web servers: a file's identity, and its bytes once, without retries.

Each is asked through its own library, with credentials from the environment or anonymously.  Errors are the
libraries' own; `files` decides what becomes of them.
"""

import hashlib
import os
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.request import getproxies, proxy_bypass

from megatron_eagle.data.media.remote.addresses import RemoteAddress, parse_place
from megatron_eagle.data.media.remote.settings import CREDENTIALS, RemoteSettings
from megatron_eagle.problems import Problem

_PIECE = 1 << 20  # bytes asked for at a time
_RANGE = 1 << 24  # bytes of a request where a store is asked for parts
_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_CONNECTIONS = 64


class BadAnswer(Exception):
    """A store's answer that cannot be right, in words: another try may get a better one."""


class NoIdentity(Problem):
    """A file that could not be told from another one of its size."""


class Refusal(Exception):
    """A status that says no: `args[0]`."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


@dataclass(frozen=True)
class Identity:
    """What tells a file from another one at its address: bytes, and what the store gives beside them (ETag,
    generation, hash of the content, date)."""

    size: int
    tag: str

    @property
    def date(self) -> int:
        """A time of change that stands for both, in nanoseconds: a file of the cache has it, and a token
        store keeps it.  It lies between 2001 and 2033, in whole microseconds, which file systems keep."""
        digest = hashlib.blake2b(f"{self.size}:{self.tag}".encode(), digest_size=8).digest()
        return (10**15 + int.from_bytes(digest) % 10**15) * 1000


@dataclass(frozen=True)
class OpenFile:
    """A file that is being read: what it is, and its bytes."""

    identity: Identity
    pieces: Iterator[bytes]


class Store(Protocol):
    """Files of one scheme; safe in many threads of a process."""

    def identity(self, address: RemoteAddress) -> Identity:
        """What the file is now."""
        ...

    def open(self, address: RemoteAddress) -> Any:
        """A context with an `OpenFile`."""
        ...


def open_store(scheme: str, settings: RemoteSettings) -> Store:
    """The store of a scheme.  Nothing is asked of it yet."""
    stores: Mapping[str, Callable[[RemoteSettings], Store]] = {
        "s3": S3Store,
        "gs": GoogleStore,
        "hf": HubStore,
        "https": WebStore,
    }
    return stores[scheme](settings)


def has_credentials(scheme: str) -> bool:
    """Whether the environment holds credentials for a scheme."""
    return any(os.environ.get(name) for name in CREDENTIALS[scheme])


class S3Store:
    """Amazon S3 and what speaks its language (AWS_ENDPOINT_URL), through s3fs."""

    def __init__(self, settings: RemoteSettings):
        from s3fs import S3FileSystem

        self._timeout = settings.timeout_s
        self._files = S3FileSystem(
            anon=not has_credentials("s3"),
            config_kwargs={
                "connect_timeout": settings.timeout_s,
                "read_timeout": settings.timeout_s,
                "retries": {"total_max_attempts": 1},
                "max_pool_connections": _CONNECTIONS,
            },
            skip_instance_cache=True,
        )
        self._files.retries = 1

    def identity(self, address: RemoteAddress) -> Identity:
        """By HEAD."""
        return _s3_identity(self._call("head_object", address))

    @contextmanager
    def open(self, address: RemoteAddress) -> Iterator[OpenFile]:
        """One GET."""
        answer = self._call("get_object", address)
        body = answer["Body"]
        try:
            yield OpenFile(_s3_identity(answer), self._pieces(body))
        finally:
            body.close()

    def _call(self, method: str, address: RemoteAddress) -> Mapping[str, Any]:
        # The library's own timeouts come first and say more.
        answer: Mapping[str, Any] = self._files.call_s3(
            method, Bucket=address.place, Key=address.path, timeout=2 * self._timeout
        )
        return answer

    def _pieces(self, body: Any) -> Iterator[bytes]:
        from fsspec.asyn import sync

        while piece := sync(self._files.loop, body.read, _PIECE, timeout=2 * self._timeout):
            yield piece


def _s3_identity(answer: Mapping[str, Any]) -> Identity:
    return Identity(int(answer["ContentLength"]), str(answer.get("ETag", "")))


class GoogleStore:
    """Google Cloud Storage (STORAGE_EMULATOR_HOST: another that speaks its language), through gcsfs."""

    def __init__(self, settings: RemoteSettings):
        # Not the class that the package offers first: that one asks gRPC services what kind a bucket is.
        from gcsfs.core import GCSFileSystem

        self._timeout = settings.timeout_s
        self._files = GCSFileSystem(
            token=os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") or "anon",
            access="read_only",
            requests_timeout=settings.timeout_s,
            skip_instance_cache=True,
        )

    def identity(self, address: RemoteAddress) -> Identity:
        """By the object's description."""
        described = self._describe(address)
        return Identity(int(described["size"]), str(described.get("generation", described.get("etag", ""))))

    @contextmanager
    def open(self, address: RemoteAddress) -> Iterator[OpenFile]:
        """The description, then parts of that generation."""
        described = self._describe(address)
        identity = Identity(
            int(described["size"]), str(described.get("generation", described.get("etag", "")))
        )
        yield OpenFile(identity, self._pieces(address, identity.size, described.get("generation")))

    def _describe(self, address: RemoteAddress) -> Mapping[str, Any]:
        described: Mapping[str, Any] = self._ask("b/{}/o/{}", address.place, address.path, json_out=True)
        return described

    def _pieces(self, address: RemoteAddress, size: int, generation: str | None) -> Iterator[bytes]:
        url = self._files.url(f"{address.place}/{address.path}")
        pinned = {"generation": generation} if generation else {}
        for start in range(0, size, _RANGE):
            part = {"Range": f"bytes={start}-{min(size, start + _RANGE) - 1}"}
            try:
                _, piece = self._ask(url, headers=part, **pinned)
            except FileNotFoundError:
                raise BadAnswer("it changed while it was read") from None
            yield piece

    def _ask(self, path: str, *args: str, **kwargs: Any) -> Any:
        try:
            return self._files.call("GET", path, *args, timeout=2 * self._timeout, **kwargs)
        except OSError as error:
            if str(error).startswith("Forbidden"):  # as the library says it
                raise Refusal(403) from None
            raise


class WebStore:
    """Web servers, through fsspec's client (aiohttp).  Redirects lead only where the run allows."""

    def __init__(self, settings: RemoteSettings, trusted: str = ""):
        import aiohttp
        from fsspec.implementations.http import HTTPFileSystem

        self._settings, self._trusted = settings, trusted
        wait = settings.timeout_s
        self._files = HTTPFileSystem(
            client_kwargs={
                "timeout": aiohttp.ClientTimeout(total=None, connect=wait, sock_connect=wait, sock_read=wait),
                "auto_decompress": False,
            },
            skip_instance_cache=True,
        )
        self._tls = ssl.create_default_context()

    def identity(self, address: RemoteAddress) -> Identity:
        """By HEAD, or by the head of a GET where a server does not know that."""
        try:
            with self.answer(str(address), "HEAD") as answer:
                return _web_identity(answer.headers, address)
        except (Refusal, BadAnswer, NoIdentity):
            with self.answer(str(address)) as answer:
                return _web_identity(answer.headers, address)

    @contextmanager
    def open(self, address: RemoteAddress) -> Iterator[OpenFile]:
        """One GET."""
        with self.answer(str(address)) as answer:
            yield OpenFile(_web_identity(answer.headers, address), self.pieces(answer))

    @contextmanager
    def answer(
        self, url: str, method: str = "GET", headers: Mapping[str, str] | None = None
    ) -> Iterator[Any]:
        """The answer to a request, after redirects; `headers` go to the first host alone.

        Raises:
            Refusal: its status is none of success.
            Problem: it leads to a host that the run does not name.
        """
        from fsspec.asyn import sync
        from yarl import URL

        first = target = URL(url)
        for _ in range(_MOST_REDIRECTS + 1):
            own = dict(headers or {}) if target.origin() == first.origin() else {}
            answer = sync(
                self._files.loop, self._request, method, target, own, timeout=2 * self._settings.timeout_s
            )
            try:
                if answer.status not in _REDIRECTS:
                    if answer.status != 200:
                        raise Refusal(answer.status)
                    yield answer
                    return
                target = target.join(URL(answer.headers.get("Location", ""), encoded=True))
                self._check_redirect(url, target)
            finally:
                self._files.loop.call_soon_threadsafe(answer.close)
        raise BadAnswer(f"more than {_MOST_REDIRECTS} redirects")

    def pieces(self, answer: Any) -> Iterator[bytes]:
        """The bytes of an answer."""
        from fsspec.asyn import sync

        while piece := sync(
            self._files.loop, answer.content.read, _PIECE, timeout=2 * self._settings.timeout_s
        ):
            yield piece

    async def _request(self, method: str, url: Any, headers: Mapping[str, str]) -> Any:
        session = await self._files.set_session()
        proxy = None if proxy_bypass(url.host) else getproxies().get(url.scheme)
        return await session.request(
            method,
            url,
            headers={**headers, "Accept-Encoding": "identity"},
            allow_redirects=False,
            proxy=proxy,
            ssl=self._tls,
        )

    def _check_redirect(self, url: str, target: Any) -> None:
        origin = str(target.origin())
        if origin == self._trusted:
            return
        try:
            allowed = self._settings.allow(parse_place(str(target.with_query(None))))
        except ValueError:
            allowed = False
        if not allowed:
            raise Problem(
                "redirect refused", f"{url} leads to {origin}, which is none of the hosts that the run names"
            )


def _web_identity(headers: Mapping[str, str], address: RemoteAddress) -> Identity:
    size = headers.get("Content-Length", "")
    if not size.isdigit():
        raise BadAnswer("the server does not say how many bytes it has")
    tag = headers.get("ETag") or headers.get("Last-Modified")
    if not tag:
        raise NoIdentity(
            "media without identity",
            f"{address}: the server gives neither an ETag nor a date, so that another file of that size "
            "would go unseen; download it, or have the server give one",
        )
    return Identity(int(size), tag)


class HubStore:
    """The Hugging Face hub (HF_ENDPOINT), through huggingface_hub; the bytes come as from a web server.

    Not through its file system, which lists a whole folder for one file, and follows redirects anywhere.
    """

    def __init__(self, settings: RemoteSettings):
        from huggingface_hub import constants

        self._endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        self._token = os.environ.get("HF_TOKEN") or False
        self._timeout = settings.timeout_s
        parts = self._endpoint.split("/")
        self._web = WebStore(settings, trusted="/".join(parts[:3]))

    def identity(self, address: RemoteAddress) -> Identity:
        """By HEAD; the hub gives a hash of the content."""
        return self._identity(self._url(address))

    @contextmanager
    def open(self, address: RemoteAddress) -> Iterator[OpenFile]:
        """A HEAD and a GET; what comes is held against the hash."""
        from huggingface_hub.utils import build_hf_headers

        url = self._url(address)
        identity = self._identity(url)

        def pieces() -> Iterator[bytes]:
            with self._web.answer(url, headers=build_hf_headers(token=self._token)) as answer:
                yield from _checked(self._web.pieces(answer), identity)

        yield OpenFile(identity, pieces())

    def _url(self, address: RemoteAddress) -> str:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import parse_hf_uri

        uri = parse_hf_uri(str(address))
        kind = None if uri.type == "model" else uri.type
        url: str = hf_hub_url(
            uri.id, uri.path_in_repo, repo_type=kind, revision=uri.revision, endpoint=self._endpoint
        )
        return url

    def _identity(self, url: str) -> Identity:
        from huggingface_hub import get_hf_file_metadata

        described = get_hf_file_metadata(
            url, token=self._token, timeout=self._timeout, endpoint=self._endpoint
        )
        if described.size is None:
            raise BadAnswer("the hub does not say how many bytes it has")
        return Identity(described.size, described.etag or "")


def _checked(pieces: Iterator[bytes], identity: Identity) -> Iterator[bytes]:
    """The pieces, held against git's hash of a small file or SHA-256 of a large one, if the tag is one."""
    digest = {40: hashlib.sha1, 64: hashlib.sha256}.get(len(identity.tag), hashlib.sha256)()
    if len(identity.tag) == 40:
        digest.update(b"blob %d\0" % identity.size)
    for piece in pieces:
        digest.update(piece)
        yield piece
    if len(identity.tag) in (40, 64) and digest.hexdigest() != identity.tag:
        raise BadAnswer("its content does not have the hash that the hub gives")
