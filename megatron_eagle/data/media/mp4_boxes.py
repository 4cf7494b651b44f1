"""The boxes that MP4 and QuickTime files consist of (ISO/IEC 14496-12), read without trusting any of them."""

import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np

OUTER_KINDS = {b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"uuid", b"pnot", b"udta"}
"""Boxes of a plain file: all there is of its pictures is described by `moov`."""
FIRST_KINDS = OUTER_KINDS - {b"uuid", b"pnot", b"udta"}
_MAX_OUTER = 10_000


class NotPlain(Exception):
    """The file is not of the plain kind that can be read from its boxes alone."""


class BadBox(Exception):
    """A box promises more than its file holds: `args[0]` says what."""


def outer_boxes(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start of the body and end of the outermost boxes; the end may lie behind that of the file.

    Ends at bytes that are no box: after the last one there may be some.
    """
    size = file.seek(0, 2)
    at = 0
    for _ in range(_MAX_OUTER):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8 or not all(32 <= byte < 127 for byte in head[4:8]):
            return
        length, header = struct.unpack(">I", head[:4])[0], 8
        if length == 1 and len(head) == 16:
            length, header = struct.unpack(">Q", head[8:])[0], 16
        elif length == 0:
            length = size - at
        if length < header:
            return
        yield head[4:8], at + header, at + length
        at += length


def children(body: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Kind and body of the boxes inside a box.

    Raises:
        NotPlain: where they do not fill it.
    """
    at = 0
    while at + 8 <= len(body):
        length, header = int.from_bytes(body[at : at + 4]), 8
        kind = bytes(body[at + 4 : at + 8])
        if length == 1 and at + 16 <= len(body):
            length, header = int.from_bytes(body[at + 8 : at + 16]), 16
        if length == 0 and not any(body[at:]):
            return  # QuickTime ends some boxes with four zero bytes
        if not header <= length <= len(body) - at:
            raise NotPlain(f"a box of {length} bytes in the {len(body) - at} that are left")
        yield kind, body[at + header : at + length]
        at += length


class Boxes:
    """The boxes inside a box by kind.

    Raises:
        NotPlain: where there is not one of each kind asked for.
    """

    def __init__(self, body: memoryview):
        self._found: dict[bytes, list[memoryview]] = {}
        for kind, content in children(body):
            self._found.setdefault(kind, []).append(content)

    def all(self, kind: bytes) -> list[memoryview]:
        """Every box of a kind, in the order of the file."""
        return self._found.get(kind, [])

    def get(self, kind: bytes) -> memoryview | None:
        """The one box of a kind, or None if there is none."""
        found = self.all(kind)
        if len(found) > 1:
            raise NotPlain(f"{len(found)} boxes {kind.decode('latin-1')}")
        return found[0] if found else None

    def one(self, kind: bytes) -> memoryview:
        """The one box of a kind."""
        found = self.get(kind)
        if found is None:
            raise NotPlain(f"no box {kind.decode('latin-1')}")
        return found

    def inside(self, kind: bytes) -> "Boxes":
        """The boxes inside the one box of a kind."""
        return Boxes(self.one(kind))


def number(body: memoryview, at: int, length: int = 4) -> int:
    """An unsigned number of `length` bytes.

    Raises:
        BadBox: it ends behind the end of the box.
    """
    if at + length > len(body):
        raise BadBox(f"a box ends after {len(body)} bytes, before a field of it")
    return int.from_bytes(body[at : at + length])


def table(body: memoryview, kind: str, dtype: str, columns: int, start: int = 8) -> np.ndarray:
    """The entries [n, columns] of a box with a count of them just before byte `start`, as int64.

    Raises:
        BadBox: a count that the box has no room for.
    """
    count = number(body, start - 4)
    width = np.dtype(dtype).itemsize * columns
    if count * width > len(body) - start:
        raise BadBox(f"box {kind} promises {count} entries in {len(body) - start} bytes")
    entries = np.frombuffer(body, dtype, count * columns, start)
    return entries.reshape(count, columns).astype(np.int64)
