"""Frames of plain MP4 and QuickTime files from their `moov` box alone: milliseconds for an hour of video.

The result is what FFmpeg finds by reading all packets.  What is not of the most usual kind is left to it:
fragments, several edits, changes of speed, encryption, several sample descriptions, unusual codecs.

Shapes: n coded frames ("samples"), in decoding order.
"""

import struct
from dataclasses import dataclass
from fractions import Fraction
from math import atan2, degrees, hypot

import numpy as np

from megatron_eagle.data.media.frame_table import CodedFrames
from megatron_eagle.data.media.mp4_boxes import (
    FIRST_KINDS,
    OUTER_KINDS,
    BadBox,
    Boxes,
    NotPlain,
    number,
    outer_boxes,
    table,
)
from megatron_eagle.data.media.source import open_bytes
from megatron_eagle.problems import Problem

_MAX_MOOV = 1 << 28  # bytes; an hour takes two million
_MAX_FRAMES = 1 << 25  # two weeks
# Codecs of which one sample is one shown frame, in the sample description's words.
_CODECS = {b"avc1", b"avc3", b"hvc1", b"hev1", b"vp09", b"av01", b"mp4v", b"jpeg", b"mjpa"}
# Tracks that are certainly no video; an unknown kind may become one by its codec.
_OTHER_TRACKS = {b"soun", b"text", b"sbtl", b"subt", b"clcp", b"tmcd", b"hint", b"meta"}
_IDENTITY = (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
_MAX_OFFSET = 1 << 28  # of composition; FFmpeg doubts tables with larger ones


def read_mp4(path: str, size: int) -> CodedFrames | None:
    """The coded frames of the first video track of a file of `size` bytes, or None if it is not plain MP4.

    Raises:
        Problem: a file that is cut off, unfinished, or promises more than it holds.
    """
    with open_bytes(path) as file:
        boxes = list(outer_boxes(file))
        if not boxes or boxes[0][0] not in FIRST_KINDS:
            return None
        if (end := max(end for _, _, end in boxes)) > size:
            raise Problem("truncated video", f"{path} has {size} of {end} bytes")
        if not {kind for kind, _, _ in boxes} <= OUTER_KINDS:
            return None
        movies = [(start, end) for kind, start, end in boxes if kind == b"moov"]
        if not movies:
            reason = "has no moov box: its recording or its transfer was not finished"
            raise Problem("unreadable video", f"{path} {reason}")
        start, end = movies[0]
        if end - start > _MAX_MOOV:
            raise Problem("unreadable video", f"{path} has a moov box of {end - start} bytes")
        file.seek(start)
        movie = file.read(end - start)
    try:
        return _read_movie(movie, size) if len(movies) == 1 else None
    except NotPlain:
        return None
    except BadBox as error:
        raise Problem("unreadable video", f"{path}: {error}") from None
    except _Beyond as error:
        raise Problem("truncated video", f"{path} has {size} of {error.args[0]} bytes") from None


class _Beyond(Exception):
    """Frames lie behind the end of the file: `args[0]` is where the last of them ends."""


def _read_movie(movie: bytes, size: int) -> CodedFrames:
    boxes = Boxes(memoryview(movie))
    if boxes.all(b"mvex") or b"covr" in bytes(
        movie
    ):  # fragments; a cover picture, which FFmpeg makes a track
        raise NotPlain
    header = boxes.one(b"mvhd")
    timescale = number(header, 20 if number(header, 0, 1) else 12)
    if _matrix(header, 48 if header[0] else 36) != _IDENTITY:
        raise NotPlain
    for stream, body in enumerate(boxes.all(b"trak")):
        track = Boxes(body)
        media = track.inside(b"mdia")
        kind = bytes(media.one(b"hdlr")[8:12])
        if kind == b"vide":
            return _read_track(stream, track, media, timescale, size)
        if kind not in _OTHER_TRACKS:
            raise NotPlain
    raise NotPlain


def _read_track(stream: int, track: Boxes, media: Boxes, movie_timescale: int, size: int) -> CodedFrames:
    header = media.one(b"mdhd")
    timescale = number(header, 20 if number(header, 0, 1) else 12)
    if not 0 < timescale < 1 << 31 or not 0 < movie_timescale < 1 << 31:
        raise NotPlain
    samples = _read_samples(media.inside(b"minf").inside(b"stbl"), size)
    shown = np.ones(len(samples.pts), bool)
    if track.all(b"edts") and (edits := track.inside(b"edts").get(b"elst")) is not None:
        samples, shown = _apply_edits(samples, edits, timescale, movie_timescale)
    # Frames before the first key frame may not come out: only decoding tells.
    if not samples.key[0] or (samples.pts[shown] < samples.pts[0]).any():
        raise NotPlain
    header = track.one(b"tkhd")
    return CodedFrames(
        stream=stream,
        rotation=_rotation(_matrix(header, 52 if number(header, 0, 1) else 40)),
        time_base=Fraction(1, timescale),
        linear_reason="",
        pts=samples.pts,
        key=samples.key,
        shown=shown,
        duration=samples.duration,
    )


@dataclass(frozen=True)
class _Samples:
    """Decoding and presentation times, durations (int64 [n]), key frames (bool [n]) of a track."""

    dts: np.ndarray
    pts: np.ndarray
    duration: np.ndarray
    key: np.ndarray
    reordered: bool

    def cut(self, first: int, end: int, shift: int) -> "_Samples":
        """Samples from `first` until before `end`, `shift` later."""
        part = slice(first, end)
        return _Samples(
            self.dts[part] + shift,
            self.pts[part] + shift,
            self.duration[part],
            self.key[part],
            self.reordered,
        )


def _read_samples(boxes: Boxes, size: int) -> _Samples:
    description = boxes.one(b"stsd")
    if number(description, 4) != 1 or bytes(description[12:16]) not in _CODECS:
        raise NotPlain
    # Key frames that are not in `stss`.
    if boxes.all(b"stps") or any(bytes(group[4:8]) in (b"rap ", b"sync") for group in boxes.all(b"sbgp")):
        raise NotPlain
    sizes = _sizes(boxes, size)
    n = len(sizes)
    _check_places(boxes, sizes, size)
    counts, deltas = table(boxes.one(b"stts"), "stts", ">u4", 2).T
    if counts.sum() != n or (deltas >= 1 << 31).any():
        raise NotPlain
    duration = np.repeat(deltas, counts)
    dts = np.cumsum(duration) - duration
    pts = dts
    offsets = boxes.get(b"ctts")
    if offsets is not None:
        entries = table(offsets, "ctts", ">i4", 2)
        if (entries[:, 0] < 0).any() or entries[:, 0].sum() != n or (abs(entries[:, 1]) >= _MAX_OFFSET).any():
            raise NotPlain
        pts = dts + np.repeat(entries[:, 1], entries[:, 0])
    return _Samples(dts, pts, duration, _keys(boxes, n), offsets is not None)


def _sizes(boxes: Boxes, size: int) -> np.ndarray:
    """Bytes of each sample, int64 [n], from `stsz` or its compact form."""
    box, compact = boxes.get(b"stsz"), boxes.get(b"stz2")
    header = box if box is not None else compact
    if header is None:
        raise NotPlain
    count = number(header, 8)
    if count > min(size, _MAX_FRAMES):
        raise BadBox(f"{count} frames are promised in {size} bytes")
    if box is not None and (uniform := number(box, 4)):
        sizes = np.full(count, uniform, np.int64)
    elif box is not None:
        sizes = table(box, "stsz", ">u4", 1, 12)[:, 0]
    elif (bits := header[7]) in (8, 16):
        sizes = table(header, "stz2", f">u{bits // 8}", 1, 12)[:, 0]
    else:
        raise NotPlain
    if not count or not sizes.all():
        raise NotPlain
    return sizes


def _check_places(boxes: Boxes, sizes: np.ndarray, size: int) -> None:
    """Hold each sample's end, by its chunk's place and the sizes in the chunk, against the file's.

    Raises:
        _Beyond: a sample ends behind the file.
    """
    if boxes.all(b"co64"):
        starts = table(boxes.one(b"co64"), "co64", ">i8", 1)[:, 0]
    else:
        starts = table(boxes.one(b"stco"), "stco", ">u4", 1)[:, 0]
    first, per_chunk, description = table(boxes.one(b"stsc"), "stsc", ">u4", 3).T
    runs = np.diff(first, append=len(starts) + 1)
    if not len(first) or first[0] != 1 or (runs < 1).any() or (description != 1).any():
        raise NotPlain
    if not per_chunk.all() or (per_chunk > len(sizes)).any() or (per_chunk * runs).sum() != len(sizes):
        raise NotPlain
    per_chunk = np.repeat(per_chunk, runs)
    ends = starts + np.add.reduceat(sizes, np.cumsum(per_chunk) - per_chunk)
    if (starts < 0).any() or (end := int(ends.max())) > size:
        raise _Beyond(end)


def _keys(boxes: Boxes, n: int) -> np.ndarray:
    """Which samples are key frames, bool [n]; all without `stss`."""
    box = boxes.get(b"stss")
    if box is None:
        return np.ones(n, bool)
    numbers = table(box, "stss", ">u4", 1)[:, 0]
    if not len(numbers) or numbers[0] < 1 or numbers[-1] > n or (np.diff(numbers) < 1).any():
        raise NotPlain
    keys = np.zeros(n, bool)
    keys[numbers - 1] = True
    return keys


def _apply_edits(
    samples: _Samples, box: memoryview, timescale: int, movie_timescale: int
) -> tuple[_Samples, np.ndarray]:
    """The samples that an edit list leaves, at their new times, and which of them it shows.

    Only one edit, after an empty one or not, at normal speed.  FFmpeg keeps what lies between the key frame
    before the edit and one after it, hides what is outside, and puts the first shown frame at time 0.
    """
    form = struct.Struct(
        ">QqI" if number(box, 0, 1) else ">IiI"
    )  # span in the movie's unit, time in the track's, speed
    count = number(box, 4)
    if count not in (1, 2) or len(box) < 8 + count * form.size:
        raise NotPlain
    *leading, (span, begin, speed) = form.iter_unpack(box[8 : 8 + count * form.size])
    if begin < 0 or speed != 0x10000 or any(time != -1 for _, time, _ in leading):
        raise NotPlain
    empty = sum(_rescale(span, timescale, movie_timescale) for span, _, _ in leading)
    end = begin + _rescale(span, timescale, movie_timescale)
    if end >= 1 << 62 or empty >= 1 << 62 or end == begin:
        raise NotPlain
    before = np.flatnonzero(samples.key & (samples.pts <= begin) & (samples.dts <= begin))
    if not len(before):
        raise NotPlain
    first = int(before[-1])
    spans_to_next = np.diff(samples.dts, append=samples.dts[-1] + end - begin)
    after = np.flatnonzero(samples.key[first:] & ((samples.pts + spans_to_next)[first:] >= end))
    # With reordered frames some that belong to the edit may follow the first key frame after it.
    passed = 1 if samples.reordered else 0
    stop = int(after[passed]) + 1 if len(after) > passed else len(samples.key) - first
    samples = samples.cut(first, first + stop, 0)
    shown = (begin <= samples.pts) & (samples.pts < end)
    if not shown.any():
        raise NotPlain
    start = int(samples.dts[np.argmax(shown)])
    times_shown = (samples.pts - start)[shown]
    # Negative presentation times make FFmpeg forget those before, not after them.
    negative = np.flatnonzero(times_shown + empty < 0)
    if len(negative):
        times_shown = times_shown[min(negative[-1] + 1, len(times_shown) - 1) :]
    return samples.cut(0, stop, empty - start - max(0, int(times_shown.min()))), shown


def _rescale(time: int, timescale: int, movie_timescale: int) -> int:
    """From the movie's unit to the track's, rounded to the nearest."""
    return (time * timescale + movie_timescale // 2) // movie_timescale


def _matrix(header: memoryview, at: int) -> tuple[int, ...]:
    number(header, at + 32)  # checks that the box is long enough
    return tuple(np.frombuffer(header, ">i4", 9, at).tolist())


def _rotation(matrix: tuple[int, ...]) -> int:
    """Degrees counter-clockwise, a multiple of 90, by which a track's matrix turns its pictures."""
    a, b, c, d = (matrix[i] for i in (0, 1, 3, 4))
    if not hypot(a, c) or not hypot(b, d):
        raise NotPlain
    return round(-degrees(atan2(b / hypot(b, d), a / hypot(a, c))) / 90) * 90
