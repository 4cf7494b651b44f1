"""Which frames a video file shows, when, and from where each is decoded.

A frame's number is its rank in presentation order.  Times are integers in units of `time_base` seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from megatron_eagle.data.media.source import FileMetadata
from megatron_eagle.problems import Problem


@dataclass(frozen=True)
class FrameIndex:
    """What decoding some frames of a file takes; training keeps it of the frames it shows (`VideoPlan`)."""

    file: FileMetadata
    """The file as it was when it was indexed."""
    fingerprint: int
    """`source.fingerprint` of the file."""
    stream: int
    """Number of the video stream among all streams of the file."""
    rotation: int
    """Degrees counter-clockwise that bring a decoded frame upright."""
    time_base: Fraction
    n_frames: int
    """Frames that the file shows, here or not."""
    open_gop: bool
    """Whether some frames are shown before the key frame that they are decoded after."""
    linear_reason: str
    """Why the file is decoded from its start, not by seeking; empty if seeking leads to its key frames."""
    numbers: np.ndarray
    """int64 [n], ascending: the frames that can be decoded with this index."""
    pts: np.ndarray
    """int64 [n]: their presentation times."""
    seek_points: np.ndarray
    """int64 [n]: presentation time of the key frame from which each is decoded."""

    def select(self, frame_numbers: "Sequence[int] | np.ndarray") -> "FrameIndex":
        """The index of these frames alone, each once and in ascending order.

        Raises:
            Problem: a number that the file or this index does not have.
        """
        wanted = np.unique(np.asarray(frame_numbers, np.int64))
        rank = np.searchsorted(self.numbers, wanted)
        known = np.isin(wanted, self.numbers)
        if not known.all():
            number = int(wanted[~known][0])
            reason = "not in its index" if 0 <= number < self.n_frames else f"it has {self.n_frames}, from 0"
            raise Problem("no such frame", f"{self.file.path}: frame {number}, {reason}")
        return replace(self, numbers=wanted, pts=self.pts[rank], seek_points=self.seek_points[rank])

    @property
    def times(self) -> np.ndarray:
        """float64 [n]: seconds on the file's own clock."""
        return self.pts * self.time_base.numerator / self.time_base.denominator


@dataclass(frozen=True)
class FrameTable:
    """All shown frames of a file, and its key frames: those that an edit list hides are among them.

    `pts` int64 [n] and `keyframes` int64 are ascending; `last_duration` is the last frame's own duration
    (0 = unknown).  The other fields are those of `FrameIndex`.
    """

    file: FileMetadata
    fingerprint: int
    stream: int
    rotation: int
    time_base: Fraction
    open_gop: bool
    linear_reason: str
    pts: np.ndarray
    keyframes: np.ndarray
    last_duration: int

    def seek_points(self, pts: np.ndarray) -> np.ndarray:
        """For each presentation time, that of the key frame from which its frame is decoded."""
        rank = np.searchsorted(self.keyframes, pts, side="right") - 1
        found: np.ndarray = self.keyframes[np.maximum(rank, 0)]
        return found

    @property
    def index(self) -> FrameIndex:
        """The index of all frames."""
        return FrameIndex(
            file=self.file,
            fingerprint=self.fingerprint,
            stream=self.stream,
            rotation=self.rotation,
            time_base=self.time_base,
            n_frames=len(self.pts),
            open_gop=self.open_gop,
            linear_reason=self.linear_reason,
            numbers=np.arange(len(self.pts)),
            pts=self.pts,
            seek_points=self.seek_points(self.pts),
        )


@dataclass(frozen=True)
class CodedFrames:
    """The frames of a video stream in decoding order, as a reader of containers finds them.

    `pts` int64 [n], `key` and `shown` bool [n] (an edit list hides some), `duration` int64 [n] (0 = unknown).
    """

    stream: int
    rotation: int
    time_base: Fraction
    linear_reason: str
    pts: np.ndarray
    key: np.ndarray
    shown: np.ndarray
    duration: np.ndarray

    def table(self, file: FileMetadata, fingerprint: int) -> FrameTable:
        """The same in presentation order; at least one frame must be shown."""
        # The key frame that came last before each frame; those before the first key frame count as its own.
        latest = np.maximum.accumulate(np.where(self.key, np.arange(len(self.key)), 0))
        last = np.flatnonzero(self.shown)[np.argmax(self.pts[self.shown])]
        return FrameTable(
            file=file,
            fingerprint=fingerprint,
            stream=self.stream,
            rotation=self.rotation,
            time_base=self.time_base,
            open_gop=bool((self.pts < self.pts[latest]).any()),
            linear_reason=self.linear_reason,
            pts=np.unique(self.pts[self.shown]),
            keyframes=np.unique(self.pts[self.key]),
            last_duration=int(self.duration[last]),
        )
