"""Exact decoding: the frames with the given presentation times, or an error, never a neighbouring frame."""

from collections.abc import Iterator, Sequence

import av
import numpy as np

from megatron_eagle.data.ledger import Problem
from megatron_eagle.data.media.frame_index import open_video
from megatron_eagle.data.media.frame_table import FrameIndex


class _Missed(Exception):
    """The planned seeks did not lead to a wanted frame."""


def read_frames(path: str, index: FrameIndex) -> Iterator[av.VideoFrame]:
    """Decode all frames of an index (see `FrameIndex.select`), one at a time, at the size of the file.

    Where seeking misses (damaged indexes) the rest is read linearly from the start.  Raises `Problem` if the
    file cannot be read or a frame cannot be decoded.
    """
    found = 0
    pts = index.pts.tolist()
    try:
        try:
            if index.linear_reason:
                raise _Missed
            for frame in _decode_planned(path, index.stream, pts, index.seek_points.tolist()):
                yield frame
                found += 1
        except (_Missed, av.error.InvalidDataError):
            for frame in _decode_linear(path, index.stream, pts[found:]):
                yield frame
                found += 1
    except FileNotFoundError:
        raise Problem("missing media", path) from None
    except av.error.FFmpegError as error:
        raise Problem("unreadable video", f"{path}: {error.strerror}") from None
    if found < len(pts):
        raise Problem("undecodable frame", f"{path}: the frame at pts {pts[found]} cannot be decoded")


def upright(frame: av.VideoFrame, rotation: int) -> np.ndarray:
    """A frame as uint8 [h, w, 3] RGB, turned by `rotation` degrees counter-clockwise."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), rotation // 90))


def _decode_planned(
    path: str, number: int, pts: Sequence[int], seek_points: Sequence[int]
) -> Iterator[av.VideoFrame]:
    with open_video(path) as container:
        stream = _stream(container, number)
        frames: Iterator[av.VideoFrame] = iter(())
        position = None  # presentation time of the last decoded frame
        for wanted, key in zip(pts, seek_points, strict=True):
            if position is None or key > position:
                container.seek(key, stream=stream, backward=True, any_frame=False)
                frames = container.decode(stream)
            frame = next((f for f in frames if f.pts is not None and f.pts >= wanted), None)
            if frame is None or frame.pts != wanted or frame.is_corrupt:
                raise _Missed
            position = frame.pts
            yield frame


def _decode_linear(path: str, number: int, pts: Sequence[int]) -> Iterator[av.VideoFrame]:
    """All of the file from its start; stops at a wanted frame that does not come out clean."""
    remaining = list(reversed(pts))
    with open_video(path) as container:
        stream = _stream(container, number)
        damaged = False
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                damaged = True
                continue
            for frame in frames:
                # What refers to a lost frame decodes into something else, up to the next key frame.
                damaged = damaged and not frame.key_frame
                if not remaining or frame.pts is None or frame.pts < remaining[-1]:
                    continue
                if damaged or frame.is_corrupt or frame.pts != remaining[-1]:
                    return
                remaining.pop()
                yield frame
            if not remaining:
                return


def _stream(container: av.container.InputContainer, number: int) -> av.VideoStream:
    stream = container.streams[number]
    stream.thread_type = "NONE"  # many files are decoded side by side; errors come in order
    return stream
