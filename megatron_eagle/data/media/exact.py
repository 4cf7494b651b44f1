"""Exact decoding: the frames with the given presentation times, or an error, never a neighbouring frame.

Every stretch of the file that is needed is decoded once, from a key frame that a seek leads to.  Where that
cannot be trusted, all of the file is decoded from its start.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain

import av
import numpy as np

from megatron_eagle.data.media.frame_index import open_video
from megatron_eagle.data.media.frame_list import frame_pictures
from megatron_eagle.data.media.frame_table import FrameIndex
from megatron_eagle.data.media.images import load_image
from megatron_eagle.problems import Problem

# Decoders that make up for mistakes of the encoder that the first packet names.
_NAMING = ("h264", "mpeg4")
_SLICE = re.compile(rb"\x00\x00\x01([\x01-\xaf])", re.DOTALL)  # start code of a slice of MPEG-2, its row


class _Missed(Exception):
    """A seek did not lead to the wanted frames: `args[0]` says why."""


def read_frames(
    path: str, index: FrameIndex, went_linear: Callable[[str], None] = lambda _: None
) -> Iterator[av.VideoFrame]:
    """Decode all frames of an index (see `FrameIndex.select`), one at a time, at the size of the file.

    Where seeking does not lead to a frame, the rest is read linearly from the start; `went_linear` is told
    why.

    Raises:
        Problem: the file cannot be read or a frame cannot be decoded whole: concealed damage counts, in it or
            in what it may refer to.
    """
    found = 0
    reason = index.linear_reason
    try:
        if not reason:
            try:
                for frame in _decode_planned(path, index):
                    yield frame
                    found += 1
            except _Missed as missed:
                reason = missed.args[0]
        if reason:
            went_linear(reason)
            for frame in _decode_linear(path, index.stream, index.pts[found:].tolist()):
                yield frame
                found += 1
    except FileNotFoundError:
        raise Problem("missing media", path) from None
    except av.error.FFmpegError as error:
        raise Problem("unreadable video", f"{path}: {error.strerror}") from None
    if found < len(index.pts):
        number, time = index.numbers[found], index.times[found]
        raise Problem("undecodable frame", f"{path}: frame {number} (at {time:g} s) cannot be decoded whole")


def upright(frame: av.VideoFrame, rotation: int) -> np.ndarray:
    """A frame as uint8 [h, w, 3] RGB, turned by `rotation` degrees counter-clockwise."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), rotation // 90))


def upright_frames(
    path: str, index: FrameIndex, went_linear: Callable[[str], None] = lambda _: None
) -> Iterator[np.ndarray]:
    """All frames of an index, one at a time and upright: uint8 [h, w, 3]; of a file, or given as pictures.

    As `read_frames` otherwise.
    """
    if pictures := frame_pictures(path):
        for number in index.numbers.tolist():
            yield np.asarray(load_image(pictures[number]))
        return
    for frame in read_frames(path, index, went_linear):
        yield upright(frame, index.rotation)


def _decode_planned(path: str, index: FrameIndex) -> Iterator[av.VideoFrame]:
    wanted = set(index.pts.tolist())
    with open_video(path) as container:
        stream = _stream(container, index.stream)
        _meet_encoder(container, stream)
        frames: Iterator[av.VideoFrame] = iter(())
        position = None  # presentation time of the last decoded frame
        for pts, key in zip(index.pts.tolist(), index.seek_points.tolist(), strict=True):
            if position is None or key > position:
                frames = _frames_from(container, stream, key, wanted)
            frame = next((f for f in frames if f.pts >= pts), None)
            if frame is None or frame.pts != pts:
                raise _Missed(f"the frame at {pts} does not come out")
            position = frame.pts
            yield frame


def _meet_encoder(container: av.container.InputContainer, stream: av.VideoStream) -> None:
    """Show the decoder the first packet of the file.

    It may name the encoder, on whose version the meaning of some streams depends: without it FFmpeg decodes
    4:4:4 of old x264 into something else.
    """
    if stream.codec_context.name in _NAMING:
        with suppress(av.error.InvalidDataError):
            _decode(next(container.demux(stream)))


def _frames_from(
    container: av.container.InputContainer, stream: av.VideoStream, key: int, wanted: set[int]
) -> Iterator[av.VideoFrame]:
    """Frames from the key frame at `key` on, the `wanted` among them, in presentation order."""
    codec = stream.codec_context
    # H.264 marks pictures that no other refers to (7.4.1, nal_ref_idc).  HEVC's marks hold in one layer only.
    skipping = codec.name == "h264"
    # In an MP4 file that begins with an empty edit FFmpeg seeks earlier by as much.
    for target in sorted({key, key + max(0, stream.start_time or 0)}, reverse=True):
        container.seek(target, stream=stream, backward=True, any_frame=False)
        packets = container.demux(stream)
        first = next(packets)
        if first.is_keyframe and first.pts is not None and first.pts <= key:
            break
    else:
        raise _Missed(f"a seek to {key} leads to {first.pts}")
    start = last = first.pts
    begun = first.is_discard  # a key frame that an edit list hides does not come out
    for packet in chain([first], packets):
        if skipping:
            codec.skip_frame = "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
        try:
            frames = _decode(packet)
        except av.error.InvalidDataError:
            raise _Missed(f"damage at {packet.pts}") from None
        for frame in frames:
            if frame.pts is None or frame.pts < start:
                continue  # shown before the key frame, refers to what is before it
            # Decoders hold back the first frames after a key frame from which they recover only gradually.
            begun = begun or frame.pts == start
            if not begun or frame.is_corrupt:
                raise _Missed(f"damage at {frame.pts}, after a key frame at {start}")
            if frame.pts < last:
                raise _Missed(f"the frame at {frame.pts} comes after the one at {last}")
            last = frame.pts
            yield frame


def _decode_linear(path: str, number: int, pts: list[int]) -> Iterator[av.VideoFrame]:
    """The frames at these times, from the start of the file on; stops at one that does not come out whole."""
    remaining = pts[::-1]
    with open_video(path) as container:
        stream = _stream(container, number)
        damaged = False
        for packet in container.demux(stream):
            try:
                frames = _decode(packet)
            except av.error.InvalidDataError:
                damaged = True
                continue
            for frame in frames:
                # What refers to a lost frame decodes into something else, up to the next key frame.
                damaged = frame.is_corrupt or (damaged and not frame.key_frame)
                if not remaining or frame.pts is None or frame.pts < remaining[-1]:
                    continue
                if damaged or frame.pts != remaining[-1]:
                    return
                remaining.pop()
                yield frame
            if not remaining:
                return


def _decode(packet: "av.Packet[av.VideoStream]") -> list[av.VideoFrame]:
    """The frames that come out with a packet.

    Raises:
        av.error.InvalidDataError: the packet is damaged.
    """
    if packet.size and packet.stream.codec_context.name == "mpeg2video":
        # FFmpeg conceals lost slices of MPEG-2 without a word.  There is one at least in each row of 16 lines
        # (ISO/IEC 13818-2, 6.1.2); fields are coded as two pictures.
        data = bytes(packet)
        rows = (packet.stream.codec_context.height + 15) // 16 // max(1, data.count(b"\0\0\1\0"))
        if not {*range(1, rows + 1)} <= {code[0] for code in _SLICE.findall(data)}:
            raise av.error.InvalidDataError(-1, "slices are missing")
    return packet.decode()


def _stream(container: av.container.InputContainer, number: int) -> av.VideoStream:
    stream = container.streams[number]
    assert isinstance(stream, av.VideoStream), "as indexed"
    stream.thread_type = "NONE"  # many files are decoded side by side; errors come in order
    stream.codec_context.options = {"err_detect": "explode"}  # report damage instead of concealing it
    return stream
