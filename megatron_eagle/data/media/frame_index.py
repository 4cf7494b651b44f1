"""The frame table of a video file, read without decoding its frames.

Containers' own frame counts and frame rates are wrong on edit lists, variable frame rates and damaged files,
so the table comes from the packets: from their descriptions in plain MP4, from themselves elsewhere.
"""

import struct
from itertools import islice
from pathlib import Path

import av
import numpy as np

from megatron_eagle.data.media import hints
from megatron_eagle.data.media.frame_table import CodedFrames, FrameTable
from megatron_eagle.data.media.mp4_boxes import FIRST_KINDS, outer_boxes
from megatron_eagle.data.media.mp4_index import read_mp4
from megatron_eagle.data.media.source import file_metadata, fingerprint, open_bytes, open_media
from megatron_eagle.problems import Problem

# Containers that have no index of key frames: a seek leads near one at best.
_NO_INDEX = {"mpegts": "MPEG transport stream", "mpeg": "MPEG program stream", "h264": "raw", "hevc": "raw"}
_GUESSED = 300  # frames that are decoded to see whether times that FFmpeg guessed are in order


def open_video(path: str) -> av.container.InputContainer:
    """Open a file for reading; titles and tags that are not UTF-8 do no harm.

    Raises:
        Problem: it is missing or empty.
        OSError: it cannot be opened.
        av.error.FFmpegError: it is no file that PyAV reads.
    """
    media = open_media(path)
    return av.open(str(media) if isinstance(media, Path) else media, "r", metadata_errors="replace")


def read_frame_table(path: str) -> FrameTable:
    """Read the frame table of the first video stream.

    Raises:
        Problem: a file that is missing, empty, cut off, no video, or has no frame that can be decoded.
    """
    file = file_metadata(path)
    if file.size == 0:
        raise Problem("empty file", path)
    try:
        frames = read_mp4(path, file.size) or demux(path)
    except (OSError, av.error.FFmpegError) as error:
        raise Problem("unreadable video", f"{path}: {error.strerror}{hints.of_file(path)}") from None
    if not frames.shown.any():
        raise Problem("unreadable video", f"{path} shows none of its frames")
    if (declared := _declared_size(path)) > file.size:
        raise Problem("truncated video", f"{path} has {file.size} of {declared} bytes")
    return frames.table(file, fingerprint(path))


def demux(path: str) -> CodedFrames:
    """The coded frames of any container, from all packets and a frame: it alone knows all kinds of rotation.

    Raises:
        Problem: the file has no video that can be read.
        av.error.FFmpegError: whatever PyAV finds wrong with the file.
    """
    packets: list[tuple[int, int, bool, bool]] = []
    with open_video(path) as container:
        if container.format.name == "image2" or container.format.name.endswith("_pipe"):
            raise Problem("unreadable video", f"{path} is a picture; name it as an image")
        if not container.streams.video:
            raise Problem("unreadable video", f"{path} has no video stream")
        stream = container.streams.video[0]
        for packet in container.demux(stream):
            if packet.size and packet.pts is not None and not packet.is_corrupt:
                packets.append((packet.pts, packet.duration or 0, packet.is_keyframe, not packet.is_discard))
        number, time_base = stream.index, stream.time_base
        guessed = container.format.name == "avi" and stream.codec_context.has_b_frames
        reason = next((_NO_INDEX[n] for n in container.format.name.split(",") if n in _NO_INDEX), "")
    if not packets or time_base is None:
        raise Problem("unreadable video", f"{path} has no frames with presentation times")
    with open_video(path) as container:
        frames = container.decode(video=0)
        first = next(frames, None)
        times = [frame.pts for frame in islice(frames, _GUESSED if guessed else 0)]
    if None in times or times != sorted(time for time in times if time is not None):
        reason = "AVI does not hold the times of its B-frames; copy it into another container"
        raise Problem("unreadable video", f"{path}: {reason}")
    if first is None:
        raise Problem("unreadable video", f"{path}: no frame can be decoded")
    pts, duration, key, shown = np.array(packets, np.int64).T
    if not key.any():
        key[0], reason = 1, "no key frames"
    # A video that was cut out of another may begin with frames that refer to what was before: they never
    # come out.
    shown &= pts >= min(first.pts, pts[key.argmax()])
    return CodedFrames(
        stream=number,
        rotation=round(first.rotation / 90) * 90,
        time_base=time_base,
        linear_reason=reason,
        pts=pts,
        key=key > 0,
        shown=shown > 0,
        duration=duration,
    )


def _declared_size(path: str) -> int:
    """Bytes that the file should have by its own outermost structure (MP4, AVI, Matroska); 0 = not known.

    FFmpeg reads a file that was cut off as a shorter one, without a word.
    """
    with open_bytes(path) as file:
        head = file.read(64)
        if head[:4] == b"RIFF":
            size = struct.unpack("<I", head[4:8])[0]
            return 8 + size if size < 0xFFFFFFFF else 0
        if head[:4] == b"\x1a\x45\xdf\xa3":
            _, start = _ebml_size(head, 4)
            start += _ebml_size(head, 4)[0]
            size, body = _ebml_size(head, start + 4) if len(head) >= start + 12 else (0, 0)
            return body + size if size else 0
        if head[4:8] not in FIRST_KINDS:
            return 0
        return max((end for _, _, end in outer_boxes(file)), default=0)


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """A Matroska element's size field at byte `at`: (size, where its body begins); unknown is 0."""
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
    return (0 if value == (1 << 7 * length) - 1 else value), at + length
