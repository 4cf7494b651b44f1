"""The canonical sample: what every input dialect is read into and every later step works on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

SYSTEM, USER, ASSISTANT, OBSERVATION = "system", "user", "assistant", "observation"


@dataclass(frozen=True)
class ImageRef:
    """Stands in a turn's content where picture `index` (0-based in `Sample.images`) is shown."""

    index: int


@dataclass(frozen=True)
class VideoRef:
    """Stands in a turn's content where video `index` (0-based in `Sample.videos`) is shown."""

    index: int


@dataclass(frozen=True)
class DocumentRef:
    """Stands in a turn's content where document `index` (0-based in `Sample.documents`) is shown."""

    index: int


Part = str | ImageRef | VideoRef | DocumentRef


@dataclass(frozen=True)
class Turn:
    """One message.  An assistant's turn is one string: media names inside an answer are plain text.

    An answer that is not `learned` is read like a question.
    """

    role: str
    parts: tuple[Part, ...]
    learned: bool = True


@dataclass(frozen=True)
class FrameList:
    """Frames of a video that are given one by one: pictures as `Sample.images` has them, and the seconds at
    which they are shown, ascending.  `assumed` is whether nobody said so."""

    pictures: tuple[str, ...]
    times: tuple[Fraction, ...]
    assumed: bool = False


@dataclass(frozen=True)
class VideoSource:
    """A video file, or the clip of it that has start <= t < end (seconds; None = the file's own end).

    With `frames` it is these, and `path` the folder of the first.
    """

    path: str
    start: Fraction | None = None
    end: Fraction | None = None
    frames: FrameList | None = None


Document = str | tuple[str, ...]
"""The path of a PDF file, or the pictures of the pages."""


@dataclass(frozen=True)
class Sample:
    """One conversation with its media.

    Every image, video and document is referred to exactly once.  A picture is named by a path, or as
    `media.source` names one in a database.

    Attributes:
        file, line: where it was read; lines count from 1.
        overrides: this sample's own sampling settings (`fps`, `min_frames`, `max_frames`, `max_tiles`).
    """

    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    videos: tuple[VideoSource, ...] = ()
    documents: tuple[Document, ...] = ()
    file: str = ""
    line: int = 0
    overrides: Mapping[str, float] = field(default_factory=dict)


def clock_seconds(text: str) -> float:
    """ "1:02:03.5" -> 3723.5; also plain seconds."""
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(part)
    return total
