"""Media as files of this machine: what is remote is fetched into the cache, everything else is itself.

Every reader of media is given the name that `MediaAccess.local` makes of an address, and knows nothing of
where it came from.  What it says about that file is said of the address.
"""

import hashlib
import os
import posixpath
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from megatron_eagle.data.media.addresses.inline import is_inline, short_name
from megatron_eagle.data.media.frame_list import frame_list_name, frame_pictures
from megatron_eagle.data.media.remote.addresses import RemoteAddress, parse_address, remote_name
from megatron_eagle.data.media.remote.cache import HeldFile, MediaCache
from megatron_eagle.data.media.remote.settings import CREDENTIALS, RemoteSettings
from megatron_eagle.data.media.remote.stores import (
    BadAnswer,
    Identity,
    Store,
    has_credentials,
    open_store,
)
from megatron_eagle.data.media.source import FileMetadata, file_metadata, member_ref
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem

T = TypeVar("T")
CHANGED = "media changed since preprocessing"
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 10.0  # seconds between tries
_TRY_AGAIN = (408, 425, 429)  # and from 500 on
_MOST_SUFFIX = 12


class MediaAccess:
    """Makes files of media, as far as `settings` allow; safe in many threads, and after a fork.

    Raises:
        UserError: the cache cannot be used.
    """

    def __init__(self, settings: RemoteSettings | None = None):
        self._settings = settings or RemoteSettings()
        self._cache: MediaCache | None = None
        if self._settings.hosts and self._settings.cache:
            # A file that another process fetches may take as many tries as one of ours.
            patience = self._settings.timeout_s * self._settings.attempts
            self._cache = MediaCache(self._settings.cache, self._settings.cache_bytes, patience)
        self._opening = threading.Lock()
        self._stores: dict[tuple[int, str], Store] = {}

    @contextmanager
    def local(self, name: str, probed: FileMetadata | None = None) -> Iterator[str]:
        """The name of the same medium in files of this machine, which stay there meanwhile.

        Args:
            probed: what its file was before; another one is refused.

        Raises:
            Problem: it may not be fetched, cannot be, or is another one than was probed; and what is raised
                meanwhile, said of the address.
        """
        with ExitStack() as held:
            files: dict[str, str] = {}  # addresses by the files that stand for them
            local = self._localised(name, probed, held, files)
            try:
                yield local
            except Problem as problem:
                raise Problem(problem.kind, _said_of(problem.detail, files)) from None

    def metadata(self, name: str) -> FileMetadata:
        """A medium as it is now; a remote one is asked for, not fetched.

        Raises:
            Problem: it is missing, or may not be asked for.
        """
        if pictures := frame_pictures(name):
            files = [self.metadata(picture) for picture in pictures.values()]
            return FileMetadata(name, sum(file.size for file in files), max(file.mtime_ns for file in files))
        remote = remote_name(name)
        if remote is None or is_inline(name):
            return file_metadata(name)
        address = self._allowed(remote.address)
        identity = self._patiently(remote.address, lambda: self._store(address.scheme).identity(address))
        member = member_ref(name)
        return FileMetadata(name, member.size if member else identity.size, identity.date)

    def check_allowed(self, name: str) -> None:
        """Let pass what may be fetched.

        Raises:
            UserError: the run does not name its host.
        """
        if remote := remote_name(name):
            try:
                self._allowed(remote.address)
            except Problem as problem:
                raise UserError(str(problem)) from None

    def _localised(
        self, name: str, probed: FileMetadata | None, held: ExitStack, files: dict[str, str]
    ) -> str:
        if pictures := frame_pictures(name):
            files |= {picture: short_name(picture) for picture in pictures.values() if is_inline(picture)}
            if not any(map(remote_name, pictures.values())):
                return name
            # Of single pictures no identity is kept; together they are held against that of the video.
            return frame_list_name(
                {number: self._localised(picture, None, held, files) for number, picture in pictures.items()}
            )
        if is_inline(name):
            files[name] = short_name(name)
        remote = remote_name(name)
        if remote is None:
            return name
        file = held.enter_context(self._held(remote.address, probed))
        files[file.path] = remote.address
        return remote.at(file.path)

    def _held(self, text: str, probed: FileMetadata | None) -> HeldFile:
        address = self._allowed(text)
        assert self._cache is not None, "a run that names hosts has a cache"
        suffix = posixpath.splitext(address.path.partition("?")[0])[1].lower()
        if not re.fullmatch(r"\.[a-z0-9]+", suffix) or len(suffix) > _MOST_SUFFIX:
            suffix = ""
        date = None if probed is None else probed.mtime_ns
        if date is not None and (found := self._cache.find(_key(address, date), suffix)):
            return found
        return self._patiently(text, lambda: self._fetch(text, address, suffix, date))

    def _fetch(self, text: str, address: RemoteAddress, suffix: str, date: int | None) -> HeldFile:
        """Fetch a file, unless it is in the cache by now."""
        cache = self._cache
        assert cache is not None, "as above"
        with ExitStack() as stack:
            stack.enter_context(cache.fetching(_key(address, 0)))
            if date is not None and (found := cache.find(_key(address, date), suffix)):
                return found
            opened = stack.enter_context(self._store(address.scheme).open(address))
            identity: Identity = opened.identity
            key = _key(address, identity.date)
            if date is None:
                if found := cache.find(key, suffix):
                    return found
            elif identity.date != date:
                raise Problem(CHANGED, f"{text} has another {_TAGS[address.scheme]} or size")

            def write(take: Callable[[bytes], None]) -> None:
                n = 0
                for piece in opened.pieces:
                    n += len(piece)
                    if n > identity.size:
                        break
                    take(piece)
                if n != identity.size:
                    more = "more than " if n > identity.size else f"{n:,} of "
                    raise BadAnswer(f"{more}{identity.size:,} bytes came")

            return cache.put(key, suffix, identity.size, identity.date, write)

    def _patiently(self, text: str, ask: Callable[[], T]) -> T:
        """What `ask` returns, asked again after errors that may pass.

        Raises:
            Problem: an error that will not, or the last one.
        """
        attempts = self._settings.attempts
        for attempt in range(1, attempts + 1):
            try:
                return ask()
            except (Problem, UserError):
                raise
            except Exception as error:  # of four libraries and what they are built on
                refused = _refusal(text, error)
                if refused is not None:
                    raise refused from None
                if attempt == attempts:
                    tries = f", {attempts} times" if attempts > 1 else ""
                    raise Problem("unreachable media", f"{text}: {_words(error)}{tries}") from None
                # Not all at the same time: by a fraction that differs between media.
                apart = hashlib.blake2b(text.encode(), digest_size=1).digest()[0] / 256
                time.sleep(min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)) * (0.5 + apart))
        raise AssertionError("there is at least one attempt")

    def _allowed(self, text: str) -> RemoteAddress:
        address = parse_address(text)
        if not self._settings.allow(address):
            named = ", ".join(self._settings.hosts) or "none"
            raise Problem(
                "remote media are off",
                f"{text}: the run does not name {address.host} (named: {named}); add it to --remote-host or "
                "data.remote.hosts",
            )
        return address

    def _store(self, scheme: str) -> Store:
        with self._opening:
            key = os.getpid(), scheme  # no connection survives a fork
            if key not in self._stores:
                self._stores[key] = open_store(scheme, self._settings)
            return self._stores[key]


ONLY_LOCAL = MediaAccess()
"""Media of this machine alone."""
_TAGS = {"s3": "ETag", "gs": "generation", "hf": "hash", "https": "ETag"}


def _key(address: RemoteAddress, date: int) -> str:
    return hashlib.blake2b(f"{address}\0{date}".encode(), digest_size=16).hexdigest()


def _said_of(text: str, files: dict[str, str]) -> str:
    for file, address in files.items():
        text = text.replace(file, address)
    return text


def _refusal(text: str, error: Exception) -> Problem | None:
    """What will not get better: the file is not there, or not for us."""
    status = _status(error)
    scheme = text.partition("://")[0].lower()
    if status == 404:
        return Problem("missing media", f"{text} (404)")
    if status in (401, 403):
        names = CREDENTIALS.get(scheme, ())
        hint = ""
        if names and not has_credentials(scheme):
            hint = f"; the environment has no credentials for {scheme}:// ({' or '.join(names[:2])})"
        return Problem("no access to media", f"{text} ({status}){hint}")
    if status is not None and status < 500 and status not in _TRY_AGAIN:
        return Problem("unreachable media", f"{text} ({status})")
    if "Credential" in type(error).__name__ or "Profile" in type(error).__name__:
        return Problem("no access to media", f"{text}: {_words(error)}")
    return None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that an error, or the one it came of, tells of."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            response = response.get("ResponseMetadata", {})
            found = response.get("HTTPStatusCode")
        else:
            found = getattr(response, "status_code", None)
        for value in (found, getattr(error, "status", None), getattr(error, "code", None)):
            if str(value).isdigit() and 300 <= int(str(value)) < 600:
                return int(str(value))
        if isinstance(error, FileNotFoundError):
            return 404
        if isinstance(error, PermissionError):
            return 403
        error = error.__cause__ or error.__context__
    return None


def _words(error: Exception) -> str:
    """An error in a line, without what stands behind a question mark in addresses: it may be a signature."""
    status = _status(error)
    if status is not None:
        return f"HTTP {status}"
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    if isinstance(error, BadAnswer) and lines:
        return lines[0]
    said = re.sub(r"\?\S*", "?...", lines[0])[:200] if lines else ""
    return f"{name}: {said}" if said else name
