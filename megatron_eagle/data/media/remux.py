"""Sparse remux: the packets that some frames need, copied without decoding into a small file in memory.

NVIDIA's decoders read a file from its start.  What they are given therefore holds only the stretch from the
key frame before each wanted frame up to that frame, with even timestamps from 0: no edit lists, no negative
or uneven times, no gigabytes.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import TypeAlias

import av

from megatron_eagle.data.media.frame_index import open_video
from megatron_eagle.data.media.frame_table import FrameIndex
from megatron_eagle.problems import Problem

# MP4 and MOV, Matroska and WebM.  Others have no index of key frames, or several pictures in one packet.
_CONTAINERS = {"mp4", "matroska"}
_MATROSKA_ONLY = {"vp8"}  # MP4 has no form for it
_FRAME_RATE = 25  # of the copy; any would do


class RemuxRefused(Exception):
    """The wanted packets cannot be told or cut apart: `args[0]` says why.  Decode the file itself instead."""


@dataclass(frozen=True)
class Remux:
    """A small video file, and what its reader has to know.

    Attributes:
        frames: the wanted ones, counted from 0 in presentation order.
        reorder: how many frames at most are decoded before one that is shown earlier (0 without B-frames).
        hidden_frames: some packets of VP8 or VP9 hold pictures that are not shown.
        colorspace, field_order: FFmpeg's numbers.
    """

    data: bytes
    frames: tuple[int, ...]
    n_frames: int
    reorder: int
    hidden_frames: bool
    codec: str
    width: int
    height: int
    colorspace: int
    field_order: int


def sparse_remux(path: str, index: FrameIndex) -> Remux:
    """Copy what decoding all frames of an index takes (see `FrameIndex.select`).

    Raises:
        RemuxRefused: a copy could decode to other pictures (open GOP, transport streams, key frames that a
            seek does not find, pixels that are not 8-bit 4:2:0).
        Problem: the file cannot be read.
    """
    if index.linear_reason:
        raise RemuxRefused(index.linear_reason)
    if index.open_gop:
        raise RemuxRefused("open GOP")
    try:
        with open_video(path) as source:
            return _copy(source, index)
    except FileNotFoundError:
        raise Problem("missing media", path) from None
    except av.error.FFmpegError as error:
        raise Problem("unreadable video", f"{path}: {error.strerror}") from None


def _copy(source: av.container.InputContainer, index: FrameIndex) -> Remux:
    if not _CONTAINERS & set(source.format.name.split(",")):
        raise RemuxRefused(f"container {source.format.name}")
    stream = source.streams[index.stream]
    assert isinstance(stream, av.VideoStream), "as indexed"
    context, codec = stream.codec_context, stream.codec.canonical_name
    if context.pix_fmt not in ("yuv420p", "yuvj420p"):
        # Old x264 files in 4:4:4 also need the encoder's name, which only the file's first packet has.
        raise RemuxRefused(f"pixel format {context.pix_fmt}")
    ranks: dict[int, int] = {}  # presentation time in the source -> frame number in the copy
    packets: list[_Numbered] = []  # in decoding order, with their frame numbers
    pairs = zip(index.seek_points.tolist(), index.pts.tolist(), strict=True)
    for key, wanted in groupby(pairs, key=lambda pair: pair[0]):
        segment = list(_segment(source, stream, key, {time for _, time in wanted}))
        order = {time: rank for rank, time in enumerate(sorted(_shown(packet) for packet in segment))}
        if len(order) < len(segment) or order.keys() & ranks.keys():
            raise RemuxRefused("several packets with the same presentation time")
        if not _starts_afresh(codec, context.extradata or b"", bytes(segment[0])):
            raise RemuxRefused("open GOP: a key frame does not reset the decoder")
        first = len(packets)
        ranks.update((time, first + rank) for time, rank in order.items())
        packets += [(packet, first + order[_shown(packet)]) for packet in segment]
    reorder = max(place - rank for place, (_, rank) in enumerate(packets))
    hidden_frames = any(_hides_frames(codec, bytes(packet)) for packet, _ in packets)
    return Remux(
        data=_mux(stream, packets, reorder, "matroska" if codec in _MATROSKA_ONLY else "mp4"),
        frames=tuple(ranks[time] for time in index.pts.tolist()),
        n_frames=len(packets),
        reorder=reorder,
        hidden_frames=hidden_frames,
        codec=codec,
        width=context.width,
        height=context.height,
        colorspace=context.colorspace,
        field_order=context.field_order,
    )


_Numbered: TypeAlias = "tuple[av.Packet[av.VideoStream], int]"


def _shown(packet: "av.Packet[av.VideoStream]") -> int:
    assert packet.pts is not None, "_segment gives none without"
    return packet.pts


def _segment(
    source: av.container.InputContainer, stream: av.VideoStream, key: int, wanted: set[int]
) -> "Iterator[av.Packet[av.VideoStream]]":
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
        if packet.has_sidedata("new_extradata"):
            raise RemuxRefused("the codec's parameters change inside the video")
        yield packet
        wanted.discard(packet.pts)
        if not wanted:
            return
    raise RemuxRefused(f"seeking does not lead to {'its frames' if started else 'a key frame'}")


def _starts_afresh(codec: str, extradata: bytes, packet: bytes) -> bool:
    """Whether a key frame's packet is an instantaneous refresh (IDR): nothing after it refers to before it.

    Sources: H.264 table 7-1 and HEVC table 7-1 for the kinds of units; ISO/IEC 14496-15 for where the
    decoder configuration says how long the units' sizes are.
    """
    if codec == "h264" and extradata[:1] == b"\1" and len(extradata) > 4:
        return any(head & 0x1F == 5 for head in _nal_heads(packet, (extradata[4] & 3) + 1))
    if codec == "hevc" and extradata[:1] == b"\1" and len(extradata) > 21:
        return any(head >> 1 & 0x3F in (19, 20) for head in _nal_heads(packet, (extradata[21] & 3) + 1))
    return codec not in ("h264", "hevc")


def _nal_heads(packet: bytes, length_size: int) -> Iterator[int]:
    """The first byte of each unit of a packet; the units are preceded by their sizes."""
    at = 0
    while at + length_size < len(packet):
        yield packet[at + length_size]
        at += length_size + int.from_bytes(packet[at : at + length_size], "big")


def _hides_frames(codec: str, packet: bytes) -> bool:
    """Whether a packet holds a picture that is not shown: RFC 6386, 9.1; VP9 specification, annex B."""
    if codec == "vp8":
        return not packet[0] >> 4 & 1
    return codec == "vp9" and packet[-1] & 0xE0 == 0xC0 and packet[-1] & 7 > 0


def _mux(stream: av.VideoStream, packets: "list[_Numbered]", reorder: int, container: str) -> bytes:
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
