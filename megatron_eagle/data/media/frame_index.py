"""The frame table of a video file: frame number = rank in presentation order, read without decoding.

Containers' own frame counts and frame rates are wrong on edit lists, variable frame rates and damaged files,
so the table comes from the packets.
"""

import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from megatron_eagle.data.ledger import Problem


@dataclass(frozen=True)
class FrameTable:
    """Presentation times (in units of `time_base` seconds) of all shown frames and of all key frames.

    `pts` int64 [n] and `keyframes` int64 are ascending; `last_duration` is the last packet's own duration in
    the same unit (0 = unknown); `rotation` in degrees counter-clockwise brings a decoded frame upright.
    """

    pts: np.ndarray
    keyframes: np.ndarray
    time_base: Fraction
    last_duration: int
    rotation: int

    def seek_points(self, pts: np.ndarray) -> np.ndarray:
        """For each presentation time, that of the key frame from which its frame is decoded."""
        rank = np.searchsorted(self.keyframes, pts, side="right") - 1
        return self.keyframes[np.maximum(rank, 0)]


def open_video(path: str) -> av.container.InputContainer:
    """Open a file for reading; titles and tags that are not UTF-8 do no harm.  Raises what PyAV raises."""
    return av.open(path, metadata_errors="replace")


def read_frame_table(path: str) -> FrameTable:
    """Read the packets of the first video stream.

    Raises `Problem` for a file that is missing, empty, cut off, no video, or has no frame that can be
    decoded.
    """
    try:
        size = Path(path).stat().st_size
    except OSError:
        raise Problem("missing media", path) from None
    if size == 0:
        raise Problem("empty file", path)
    try:
        with open_video(path) as container:
            if not container.streams.video:
                raise Problem("unreadable video", f"{path} has no video stream")
            stream = container.streams.video[0]
            shown, keyframes = [], []
            for packet in container.demux(stream):
                if packet.size == 0 or packet.pts is None:
                    continue
                if packet.is_keyframe:  # also those that an edit list hides: decoding begins there
                    keyframes.append(packet.pts)
                if not (packet.is_discard or packet.is_corrupt):
                    shown.append((packet.pts, packet.duration or 0))
            time_base = stream.time_base
        if not shown:
            raise Problem("unreadable video", f"{path} has no frames with presentation times")
        if (declared := _declared_size(path)) > size:
            raise Problem("truncated video", f"{path} has {size} of {declared} bytes")
        with open_video(path) as container:
            rotation = next(container.decode(video=0)).rotation
    except (av.error.FFmpegError, StopIteration) as error:
        reason = error.strerror if isinstance(error, av.error.FFmpegError) else "no frame can be decoded"
        raise Problem("unreadable video", f"{path}: {reason}") from None
    return FrameTable(
        pts=np.unique(np.array([pts for pts, _ in shown], np.int64)),
        keyframes=np.unique(np.array(keyframes, np.int64)),
        time_base=time_base,
        last_duration=max(shown)[1],
        rotation=round(rotation / 90) * 90,
    )


def _declared_size(path: str) -> int:
    """Bytes that the file should have by its own outermost structure (MP4, AVI, Matroska); 0 = not known.

    FFmpeg reads a file that was cut off as a shorter one, without a word.
    """
    with open(path, "rb") as file:
        head = file.read(64)
        if head[:4] == b"RIFF":
            size = struct.unpack("<I", head[4:8])[0]
            return 8 + size if size < 0xFFFFFFFF else 0
        if head[:4] == b"\x1a\x45\xdf\xa3":
            _, start = _ebml_size(head, 4)
            start += _ebml_size(head, 4)[0]
            size, body = _ebml_size(head, start + 4) if len(head) >= start + 12 else (0, 0)
            return body + size if size else 0
        if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
            return 0
        end = 0
        while len(head := (file.seek(end), file.read(16))[1]) >= 8:
            size = struct.unpack(">I", head[:4])[0]
            if size == 1 and len(head) == 16:
                size = struct.unpack(">Q", head[8:])[0]
            # A size of 0 means up to the end of the file; after the last box there may be bytes of no box.
            if size < 8 or not all(32 <= byte < 127 for byte in head[4:8]):
                break
            end += size
        return end


def _ebml_size(data: bytes, at: int) -> tuple[int, int]:
    """A Matroska element's size field at byte `at`: (size, where its body begins); unknown is 0."""
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big") & ((1 << 7 * length) - 1)
    return (0 if value == (1 << 7 * length) - 1 else value), at + length
