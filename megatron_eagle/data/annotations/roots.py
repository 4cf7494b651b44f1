"""What media names are relative to: a folder, or archives, whose members they then are.

A root of archives is written `members://ARCHIVE=CACHE=STATE&...`, percent-encoded: CACHE is the folder in
which the archive's index is kept, or empty, STATE tells apart archives that have had the same name.  ARCHIVE
may go on with a folder in it: `images.zip/images`.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote

from megatron_eagle.data.media.archive_index import ArchiveIndex, index_archive
from megatron_eagle.data.media.archive_scan import archive_kind, plain_name
from megatron_eagle.data.media.archive_unpack import unpacked_archive
from megatron_eagle.data.media.hints import of_file
from megatron_eagle.data.media.remote.addresses import below, is_remote
from megatron_eagle.errors import UserError
from megatron_eagle.problems import Problem

PICTURE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".avif",
    ".jp2",
    ".heic",
    ".heif",
)
"""What names a picture in a folder of frames."""
_SCHEME = "members://"
_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.zst", ".tar.bz2", ".tar.xz")
# How pieces are named of an archive that was cut for its upload: x.tar.gz.part_aa, x.tar.ab, x.zip.001.
_PIECE = re.compile(
    r"(.*\.(?:zip|tar|tgz|gz|zst|bz2|xz)\.(?:part[-_.]?)?)(?:[a-f][a-z]|\d{1,3})", re.IGNORECASE | re.DOTALL
)
_DIGITS = re.compile(r"(\d+)")


class MediaRoot(Protocol):
    """Finds media by the names that annotations give them."""

    def path(self, name: str) -> str:
        """A medium's address.

        Raises:
            Problem: there is none of this name, as far as that is known already.
        """
        ...

    def exists(self, name: str) -> bool:
        """Whether there is a medium of this name."""
        ...

    def pictures(self, name: str) -> tuple[str, ...]:
        """The pictures of a folder, in the order of the numbers in their names; nothing if it is none.

        Raises:
            Problem: a folder without pictures.
        """
        ...


class FolderRoot:
    """See `MediaRoot`."""

    def __init__(self, folder: str):
        self._folder = folder

    def path(self, name: str) -> str:
        """The path; whether the file is there will be seen when it is read."""
        return os.path.normpath(os.path.join(self._folder, name))

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return os.path.isfile(self.path(name))

    def pictures(self, name: str) -> tuple[str, ...]:
        """See `MediaRoot`."""
        folder = self.path(name)
        if not os.path.isdir(folder):
            return ()
        names = sorted(filter(_is_picture, os.listdir(folder)), key=in_order)
        if not names:
            raise Problem("bad media reference", f"{folder} is a folder without pictures")
        return tuple(os.path.join(folder, name) for name in names)


_FILES = FolderRoot("/")


class RemoteRoot:
    """See `MediaRoot`; an absolute name is that of a file.

    Nothing is asked of the store here: what is there will be seen when it is fetched.
    """

    def __init__(self, root: str):
        self._root = root

    def path(self, name: str) -> str:
        """The address."""
        return _FILES.path(name) if os.path.isabs(name) else below(self._root, name)

    def exists(self, name: str) -> bool:
        """Not known of remote files."""
        return os.path.isabs(name) and _FILES.exists(name)

    def pictures(self, name: str) -> tuple[str, ...]:
        """See `MediaRoot`; a remote folder of frames is not listed."""
        return _FILES.pictures(name) if os.path.isabs(name) else ()


@dataclass(frozen=True)
class _Part:
    """One archive of a root: as its user names it, the folder in it that names are relative to, its index."""

    name: str
    folder: str
    index: ArchiveIndex

    def find(self, name: str) -> int | None:
        """The number of the member that is meant."""
        return self.index.find(_joined(self.folder, name))


class ArchiveRoot:
    """See `MediaRoot`; an absolute name is that of a file."""

    def __init__(self, parts: Sequence[_Part]):
        self._parts = parts

    def path(self, name: str) -> str:
        """The member's address.

        Raises:
            Problem: also for a name that several of the archives have.
        """
        if os.path.isabs(name):
            return _FILES.path(name)
        found = self._found(name)
        if not found:
            there = ", ".join(part.name for part in self._parts[:3])
            raise Problem("missing media", f"{there} has no member {name}{self._hint(name)}")
        if len(found) > 1:
            there = " and in ".join(part.name for part, _ in found)
            raise Problem("bad media reference", f"{name} is in {there}")
        part, number = found[0]
        return part.index.address(number)

    def exists(self, name: str) -> bool:
        """Whether there is a member of this name."""
        return _FILES.exists(name) if os.path.isabs(name) else bool(self._found(name))

    def pictures(self, name: str) -> tuple[str, ...]:
        """See `MediaRoot`."""
        if os.path.isabs(name):
            return _FILES.pictures(name)
        found: list[tuple[str, ArchiveIndex, int]] = []
        some = False
        for part in self._parts:
            inner = _joined(part.folder, name)
            for number in part.index.below(inner) if inner and part.find(name) is None else ():
                some = True
                rest = part.index.name(number)[len(inner) + 1 :]
                if "/" not in rest and _is_picture(rest):
                    found.append((rest, part.index, number))
        if some and not found:
            raise Problem("bad media reference", f"{name} is a folder without pictures")
        found.sort(key=lambda item: in_order(item[0]))
        return tuple(index.address(number) for _, index, number in found)

    def _found(self, name: str) -> list[tuple[_Part, int]]:
        numbers = ((part, part.find(name)) for part in self._parts)
        return [(part, number) for part, number in numbers if number is not None]

    def _hint(self, name: str) -> str:
        """The folder that the archive has around all its members, where the name lies in that."""
        for part in self._parts:
            top = part.index.name(0).partition("/")[0] if len(part.index) else ""
            if top and not part.folder and part.index.find(_joined(top, name)) is not None:
                return f"; name the folder too, root: {os.path.join(part.name, top)}"
        return ""


def _joined(folder: str, name: str) -> str:
    return plain_name(f"{folder}/{name}" if folder else name)


def _is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURE_SUFFIXES)


def in_order(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in names by what they count."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in _DIGITS.split(name)]


def archives_root(paths: Iterable[str]) -> str:
    """The root that several archives make."""
    return _SCHEME + "&".join(map(_quoted, paths))


def archives_of(root: str) -> list[str]:
    """The archives of a root that archives make; nothing for another root."""
    parts = root.removeprefix(_SCHEME).split("&") if root.startswith(_SCHEME) else []
    return [_unquoted(part.split("=")[0]) for part in parts]


def prepared_root(root: str, cache: Path | None = None) -> str:
    """The root as `open_root` takes it; indexes of archives are made, and kept in `cache` if there is one.

    Packed tar archives are unpacked there.

    Raises:
        UserError: an archive is damaged, or is no archive that can be read where it lies.
    """
    if is_remote(root):
        return root
    names = archives_of(root) or ([root] if _split(root) else [])
    if not names and root.lower().endswith(_SUFFIXES) and not os.path.lexists(root):
        raise UserError(f"the archive {root} does not exist, in which media are to be")
    if not names:
        return root
    folder = "" if cache is None else _quoted(os.path.abspath(cache))
    prepared = _SCHEME + "&".join(f"{_quoted(name)}={folder}={_state(name)}" for name in names)
    open_root(prepared)
    return prepared


def _state(name: str) -> str:
    """What is different when another archive has the same name."""
    file = (_split(name) or (name,))[0]
    try:
        status = os.stat(file)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    return f"{status.st_size}.{status.st_mtime_ns}"


@lru_cache(maxsize=64)
def open_root(root: str) -> MediaRoot:
    """What names are looked up in.

    Raises:
        UserError: as `prepared_root`.
    """
    if not root.startswith(_SCHEME):
        return RemoteRoot(root) if is_remote(root) else FolderRoot(root)
    parts = []
    for part in root.removeprefix(_SCHEME).split("&"):
        name, folder, _ = part.split("=")
        name, folder = _unquoted(name), _unquoted(folder)
        file, inner = _split(name) or (name, "")
        try:
            parts.append(_Part(name, inner, open_archive(file, folder)))
        except UserError as error:
            raise UserError(f"{error}{_piece_hint(file)}") from None
    return ArchiveRoot(parts)


def _quoted(path: str) -> str:
    return quote(path, safe="", errors="surrogateescape")  # names of files are bytes


def _unquoted(text: str) -> str:
    return unquote(text, errors="surrogateescape")


def _split(root: str) -> tuple[str, str] | None:
    """The archive in a path, and the folder in the archive; None if no file is on the way."""
    path, inner = root, ""
    while path and not os.path.lexists(path):
        path, _, last = path.rstrip("/").rpartition("/")
        inner = f"{last}/{inner}".rstrip("/")
    return (path, inner) if path and os.path.isfile(path) else None


def _piece_hint(file: str) -> str:
    """What may be done, where the name of an archive that cannot be read is that of a piece of one."""
    piece = _PIECE.fullmatch(file)
    whole = re.sub(r"\.(part[-_.]?)?$", "", piece[1]) if piece else ""
    return f"; if it is a piece of an archive, join them: cat {piece[1]}* > {whole}" if piece else ""


def open_archive(file: str, cache: str) -> ArchiveIndex:
    path = Path(file)
    try:
        kind = archive_kind(path)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    if not kind:
        raise UserError(
            f"{file} is neither a folder nor a tar or zip archive: no media can be relative to it"
            f"{of_file(file)}"
        )
    folder = Path(cache) if cache else None
    if kind not in ("tar", "zip"):
        if folder is None:
            raise UserError(f"{file} is packed with {kind}; unpack it, to a folder or a plain tar archive")
        path, kind = unpacked_archive(path, kind, folder), "tar"
    return index_archive(path, kind, folder)
