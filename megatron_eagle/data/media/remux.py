"""Sparse remux: the packets that some frames of a video need, copied without decoding into a small file in memory.

NVIDIA's decoders read a file from its start.  What they are given therefore holds only the stretch from the
key frame before each wanted frame up to that frame, with even timestamps from 0: no edit lists, no negative
or uneven times, no gigabytes.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby

import av

from megatron_eagle.data.ledger import Problem
from megatron_eagle.data.media.frame_index import open_video

# Containers whose packets cannot be picked apart reliably: no seekable key frames (transport and program
# streams, raw streams), or several pictures in one packet (AVI's packed B-frames).
_REFUSED_CONTAINERS = {"mpegts", "mpeg", "avi", "h264", "hevc", "flv", "asf", "gif"}
_MATROSKA_ONLY = {"vp8", "ffv1"}  # MP4 has no form for them
_FRAME_RATE = 25  # of the copy; any would do


class RemuxRefused(Exception):
    """The wanted packets cannot be told or cut apart: `args[0]` says why.  Decode the file itself instead."""


@dataclass(frozen=True)
class Remux:
    """A small video file, and which of its frames (counted from 0 in presentation order) were wanted.

    `reorder` is how many frames at most are decoded before one that is shown earlier (0 without B-frames).
    """

    data: bytes
    frames: tuple[int, ...]
    n_frames: int
    reorder: int


def sparse_remux(path: str, pts: Sequence[int], seek_points: Sequence[int]) -> Remux:
    """Copy what decoding the frames with these presentation times takes.

    `pts` are ascending; `seek_points` holds for each the presentation time of the key frame to start from
    (see `frame_index.FrameTable.seek_points`).  Frame `frames[i]` of the result is that of `pts[i]`.

    Raises `RemuxRefused` where a copy could decode to other pictures (open GOP, transport streams, key
    frames that a seek does not find), and `Problem` for a file that cannot be read.
    """
    try:
        with open_video(path) as source:
            return _copy(source, pts, seek_points)
    except FileNotFoundError:
        raise Problem("missing media", path) from None
    except av.error.FFmpegError as error:
        raise Problem("unreadable video", f"{path}: {error.strerror}") from None


def _copy(source: av.container.InputContainer, pts: Sequence[int], seek_points: Sequence[int]) -> Remux:
    names = set(source.format.name.split(","))
    if refused := names & _REFUSED_CONTAINERS:
        raise RemuxRefused(f"container {refused.pop()}")
    stream = source.streams.video[0]
    codec = stream.codec.canonical_name
    ranks: dict[int, int] = {}  # presentation time in the source -> frame number in the copy
    packets: list[tuple[av.Packet, int]] = []  # in decoding order, with their frame numbers
    for key, wanted in groupby(zip(seek_points, pts, strict=True), key=lambda pair: pair[0]):
        segment = list(_segment(source, stream, key, {time for _, time in wanted}))
        order = {time: rank for rank, time in enumerate(sorted(packet.pts for packet in segment))}
        if len(order) < len(segment) or order.keys() & ranks.keys():
            raise RemuxRefused("several packets with the same presentation time")
        if not _starts_afresh(codec, stream.codec_context.extradata or b"", bytes(segment[0])):
            raise RemuxRefused("open GOP: a key frame does not reset the decoder")
        first = len(packets)
        ranks.update((time, first + rank) for time, rank in order.items())
        packets += [(packet, first + order[packet.pts]) for packet in segment]
    reorder = max(place - rank for place, (_, rank) in enumerate(packets))
    data = _mux(stream, packets, reorder, "matroska" if codec in _MATROSKA_ONLY else "mp4")
    return Remux(data, tuple(ranks[time] for time in pts), len(packets), reorder)


def _segment(
    source: av.container.InputContainer, stream: av.VideoStream, key: int, wanted: set[int]
) -> Iterator[av.Packet]:
    """Packets in decoding order from the key frame shown at `key` up to the last of those `wanted`."""
    source.seek(key, stream=stream, backward=True, any_frame=False)
    started = False
    for packet in source.demux(stream):
        if packet.size == 0:
            break
        if packet.pts is None or packet.is_corrupt:
            raise RemuxRefused("a packet without presentation time, or a broken one")
        if not started:
            if packet.pts != key:
                if packet.is_keyframe and packet.pts > key:
                    break
                continue
            started = True
        elif packet.pts < key:
            raise RemuxRefused("open GOP: frames shown before the key frame they are decoded after")
        if packet.has_sidedata("new_extradata"):
            raise RemuxRefused("the codec's parameters change inside the video")
        yield packet
        wanted.discard(packet.pts)
        if not wanted:
            return
    raise RemuxRefused(f"seeking does not lead to {'its frames' if started else 'a key frame'}")


def _starts_afresh(codec: str, extradata: bytes, packet: bytes) -> bool:
    """Whether a key frame's packet is an instantaneous refresh (IDR): nothing after it refers to before it.

    Sources: H.264 table 7-1 and ISO/IEC 14496-15 5.3.3 (H.264), 8.3.3 (HEVC) for the length of sizes.
    """
    if codec == "h264" and extradata[:1] == b"\1" and len(extradata) > 4:
        kinds = (unit[0] & 0x1F for unit in _nal_units(packet, (extradata[4] & 3) + 1))
        return any(kind == 5 for kind in kinds)
    if codec == "hevc" and extradata[:1] == b"\1" and len(extradata) > 21:
        kinds = (unit[0] >> 1 & 0x3F for unit in _nal_units(packet, (extradata[21] & 3) + 1))
        return any(kind in (19, 20) for kind in kinds)
    return codec not in ("h264", "hevc")


def _nal_units(packet: bytes, length_size: int) -> Iterator[bytes]:
    """Each unit's first byte, of a packet of units preceded by their sizes."""
    at = 0
    while at + length_size < len(packet):
        size = int.from_bytes(packet[at : at + length_size], "big")
        at += length_size
        yield packet[at : at + 1]
        at += size


def _mux(stream: av.VideoStream, packets: list[tuple[av.Packet, int]], reorder: int, container: str) -> bytes:
    """Write packets with the presentation time rank / 25 s, decoded in the order of the list."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as target:
        copy = target.add_stream_from_template(stream, opaque=True)
        copy.time_base = Fraction(1, _FRAME_RATE)
        for place, (packet, rank) in enumerate(packets):
            packet.stream = copy
            packet.time_base = Fraction(1, _FRAME_RATE)
            packet.pts, packet.dts, packet.duration = rank, place - reorder, 1
            target.mux(packet)
    return buffer.getvalue()
