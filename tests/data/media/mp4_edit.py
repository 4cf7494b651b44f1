"""Changes to MP4 files whose `moov` box is at the end, so that nothing else moves."""

import struct
from collections.abc import Callable

import numpy as np


def rewrite(data: bytes, path: list[bytes], edit: Callable[[bytes], bytes]) -> bytes:
    """Replace the body of the first box at `path` by `edit(body)`; a missing one begins empty."""
    out, at, found = b"", 0, False
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + size]
        if kind == path[0] and not found:
            found = True
            body = rewrite(body, path[1:], edit) if len(path) > 1 else edit(body)
        out += struct.pack(">I4s", len(body) + 8, kind) + body
        at += size
    if not found:
        body = rewrite(b"", path[1:], edit) if len(path) > 1 else edit(b"")
        out += struct.pack(">I4s", len(body) + 8, path[0]) + body
    return out


def rename(data: bytes, path: list[bytes], kind: bytes, body: Callable[[bytes], bytes]) -> bytes:
    """Replace the first box at `path` by one of another kind with the body `body(old)`."""
    content = {}
    data = rewrite(data, path, lambda old: content.setdefault("old", old))
    data = rewrite(data, path, lambda old: b"")
    data = data.replace(struct.pack(">I4s", 8, path[-1]), struct.pack(">I4s", 8, kind))
    return rewrite(data, [*path[:-1], kind], lambda _: body(content["old"]))


TRACK = [b"moov", b"trak"]
SAMPLES = [*TRACK, b"mdia", b"minf", b"stbl"]


def edit_list(data: bytes, edits: list[tuple[int, int]], version: int = 0) -> bytes:
    """Give the first track the edits (span in the movie's unit, begin in the track's; -1 is empty)."""
    form = ">Qqi" if version else ">Iii"
    entries = b"".join(struct.pack(form, span, begin, 0x10000) for span, begin in edits)
    body = bytes([version, 0, 0, 0]) + struct.pack(">I", len(edits)) + entries
    return rewrite(data, [*TRACK, b"edts", b"elst"], lambda _: body)


def shift_offsets(data: bytes, shift: int) -> bytes:
    """Add to all composition offsets; version 1 if some become negative."""

    def edit(body: bytes) -> bytes:
        entries = np.frombuffer(body[8:], ">i4").reshape(-1, 2).copy()
        entries[:, 1] += shift
        return bytes([int((entries[:, 1] < 0).any()), 0, 0, 0]) + body[4:8] + entries.tobytes()

    return rewrite(data, [*SAMPLES, b"ctts"], edit)


def rotate(data: bytes, degrees: int) -> bytes:
    """Turn the first track's pictures counter-clockwise by a multiple of 90 degrees."""
    a, b = {0: (1, 0), 90: (0, -1), 180: (-1, 0), 270: (0, 1)}[degrees]
    matrix = struct.pack(">9i", a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30)
    return rewrite(data, [*TRACK, b"tkhd"], lambda body: body[:40] + matrix + body[76:])


def long_headers(data: bytes) -> bytes:
    """The movie's, the track's and the media's headers in their 64-bit form (version 1)."""

    def movie(body: bytes) -> bytes:
        created, changed, timescale, duration = struct.unpack(">4I", body[4:20])
        return b"\1\0\0\0" + struct.pack(">QQIQ", created, changed, timescale, duration) + body[20:]

    def track(body: bytes) -> bytes:
        created, changed, number, reserved, duration = struct.unpack(">5I", body[4:24])
        long = struct.pack(">QQIIQ", created, changed, number, reserved, duration)
        return b"\1" + body[1:4] + long + body[24:]

    data = rewrite(data, [b"moov", b"mvhd"], movie)
    data = rewrite(data, [*TRACK, b"tkhd"], track)
    return rewrite(data, [*TRACK, b"mdia", b"mdhd"], movie)


def long_places(data: bytes) -> bytes:
    """Places of chunks as 64-bit numbers."""

    def widen(body: bytes) -> bytes:
        return body[:8] + np.frombuffer(body[8:], ">u4").astype(">u8").tobytes()

    return rename(data, [*SAMPLES, b"stco"], b"co64", widen)


def compact_sizes(data: bytes) -> bytes:
    """Sizes of samples as 16-bit numbers."""

    def narrow(body: bytes) -> bytes:
        return (
            bytes([0, 0, 0, 0, 0, 0, 0, 16])
            + body[8:12]
            + np.frombuffer(body[12:], ">u4").astype(">u2").tobytes()
        )

    return rename(data, [*SAMPLES, b"stsz"], b"stz2", narrow)


def long_box(data: bytes) -> bytes:
    """`moov` with a 64-bit size."""
    at = data.rindex(b"moov") - 4
    return data[:at] + struct.pack(">I4sQ", 1, b"moov", len(data) - at + 8) + data[at + 8 :]
