"""How a record names its media: pictures, videos, clips, frames given one by one, documents."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from megatron_eagle.data.annotations.keys import OF_VIDEOS, RATE, SAMPLING, TIMES, UNSUPPORTED_KEY
from megatron_eagle.data.annotations.roots import PICTURE_SUFFIXES, open_root
from megatron_eagle.data.media.addresses.inline import check_inline, is_inline
from megatron_eagle.data.media.remote.addresses import is_remote, parse_address, without_secrets
from megatron_eagle.data.media.source import database_picture, member_ref, open_bytes, row_ref
from megatron_eagle.data.sample import Document, FrameList, VideoSource
from megatron_eagle.problems import Problem

OVERRIDES = ("fps", "min_frames", "max_frames", "max_tiles")
FRAMES_FPS = Fraction(2)
"""Frames a second of a list of frames that says nothing of it, as Qwen's readers take it."""
_TILES = ("max_dynamic_tiles", "max_dynamic_patch")  # what EAGLE and InternVL call max_tiles
_SIDES = ("start", "end")
_CLOSEST = Fraction(1, 10**6)  # seconds between two frames


@dataclass
class RecordMedia:
    """The media of a record, in the order in which it names them.

    `settings` are those that a typed part gives for its own video, one entry a video.
    """

    images: list[str] = field(default_factory=list)
    videos: list[VideoSource] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)

    def add_video(self, video: VideoSource, own: Mapping[str, Any]) -> None:
        """Add a video, with the sampling settings in its own object.

        Raises:
            Problem: the object gives times of frames, and its frames are not given one by one.
        """
        found = {key: own[key] for key in SAMPLING if own.get(key) is not None}
        if video.frames is not None:
            found.pop("fps", None)
        else:
            _check_no_rate(own)
        if own.get("nframes") is not None:  # exactly so many
            found |= {"min_frames": own["nframes"], "max_frames": own["nframes"]}
        self.videos.append(video)
        self.settings.append(found)

    def counts(self) -> dict[str, int]:
        """How many there are, by what a placeholder calls them."""
        return {"image": len(self.images), "video": len(self.videos), "document": len(self.documents)}


class References:
    """Reads references to media.

    `root` is what paths are relative to, `frames_fps` the rate of frames that are given one by one and say
    nothing of it.
    """

    def __init__(self, root: str, frames_fps: float | None = None):
        self._root = open_root(root)
        self._rate = FRAMES_FPS if frames_fps is None else Fraction(str(frames_fps))
        self._assumes = frames_fps is None

    def of_record(self, record: Mapping[str, Any]) -> RecordMedia:
        """Media named beside the text, under any of the dialects' keys.

        Raises:
            Problem: a key holds no reference to its kind of medium, or a section that cannot be.
        """
        images = as_list(record.get("image")) + as_list(record.get("images"))
        if "lmdb_file" in record or "lmdb_key" in record:
            images.append({key: record.get(key) for key in ("lmdb_file", "lmdb_key")})
        videos = _videos(record.get("video")) + _videos(record.get("videos"))
        for item in as_list(record.get("data")):
            kind = item.get("type") if isinstance(item, dict) else None
            if kind == "image":
                images += as_list(item.get("image_list"))
            elif kind == "video":
                videos += as_list(item.get("video_list"))
            elif kind != "text":
                raise Problem("unsupported media", f"data item of type {kind!r}")
        media = RecordMedia(images=[self.image(item) for item in images])
        clips = _clips(record, len(videos))
        for item, clip in zip(videos, clips, strict=True):
            media.add_video(self.video(item, record, clip), item if isinstance(item, dict) else {})
        media.documents += self._documents(record)
        return media

    def image(self, item: object) -> str:
        """A picture by its path, or as `media.source` names one in a database.

        Raises:
            Problem: it is no reference to a picture.
        """
        if isinstance(item, dict):
            if "lmdb_file" in item or "lmdb_key" in item:
                key = item.get("lmdb_key")
                if not isinstance(key, str) or not key:
                    raise Problem("bad media reference", f"lmdb_key must be a text, not {key!r}")
                return database_picture(self.path(item.get("lmdb_file")), whole_text(key))
            if said := [key for key in item if key in OF_VIDEOS]:
                raise Problem(UNSUPPORTED_KEY, f'"{said[0]}" of a picture')
            item = _named(item, ("image", "path"))
        return self.path(item)

    def video(
        self, item: object, record: Mapping[str, Any], clip: Mapping[str, Any] | None = None
    ) -> VideoSource:
        """A video: a file, a folder of frames, or a list of them.

        Its own object may say where a clip begins and ends and how its frames lie in time, else `clip` and
        the record do.

        Raises:
            Problem: it is no reference to a video, or its section cannot be.
        """
        own: Mapping[str, Any] = item if isinstance(item, dict) else {}
        if own:
            if "lmdb_file" in own or "lmdb_key" in own:
                raise Problem("unsupported media", "videos in lmdb files are not read; unpack them")
            item = _named(own, ("video", "frames", "path"))
        given = (_clips(own, 1)[0], clip or {})
        start, end = (_side(given, side) for side in _SIDES)
        if start is not None and end is not None and start >= end:
            raise Problem("empty clip", f"start {float(start):g} s is not before end {float(end):g} s")
        if isinstance(item, list):
            pictures = tuple(self.image(picture) for picture in item)
            if not pictures:
                raise Problem("bad media reference", "a video without frames")
            path = os.path.dirname(pictures[0])
        else:
            name = self._name(item)
            pictures = () if is_address(name) else self._root.pictures(name)
            path = os.path.dirname(pictures[0]) if pictures else self.path(item)
        frames = None
        if pictures:
            times = _times(own or record, record, len(pictures))
            assumed = tuple(k / self._rate for k in range(len(pictures)))
            frames = FrameList(pictures, times or assumed, not times and self._assumes)
        return VideoSource(path, start, end, frames)

    def _documents(self, record: Mapping[str, Any]) -> list[Document]:
        """The documents beside the text: `document` is one, or a list of such; `documents` is a list."""
        one = record.get("document")
        several = (
            isinstance(one, list) and one and all(isinstance(item, list) or _is_pdf(item) for item in one)
        )
        found = [] if one is None else one if several else [one]
        return [self.document(item) for item in [*found, *as_list(record.get("documents"))]]

    def document(self, item: object) -> Document:
        """One document: a PDF file, known by its suffix, or the pictures of its pages.

        Raises:
            Problem: it is no reference to a document.
        """
        if _is_pdf(item):
            return self.path(item)
        pages = [item] if isinstance(item, dict) else as_list(item)
        if not pages or any(map(_is_pdf, pages)):
            raise Problem(
                "bad media reference",
                f"a document is one PDF file or a list of page images, not {_shown(item)}",
            )
        return tuple(self.image(page) for page in pages)

    def path(self, value: object) -> str:
        """A file's path.

        Raises:
            Problem: what is none.
        """
        name = self._name(value)
        return name if is_address(name) else self._root.path(name)

    def _name(self, value: object) -> str:
        """A file's name as it is written."""
        if not isinstance(value, str) or not value or "\0" in value:
            raise Problem("bad media reference", f"expected a file name, not {_shown(value)}")
        value = whole_text(value.removeprefix("file://"))
        if is_remote(value):
            return str(parse_address(value))
        if is_inline(value):
            return check_inline(value)
        if not is_address(value) and "://" in value:
            named = without_secrets(value)[:60]
            raise Problem("unsupported media", f"{named} is no local file{_hint(value)}")
        return value


def _shown(value: object) -> str:
    """What a message may repeat of something that was not understood: a beginning without secrets."""
    return without_secrets(repr(value))[:80]


def _hint(address: str) -> str:
    return "; remote media are read from https://, not plain http://" if address.startswith("http://") else ""


def _named(item: Mapping[str, Any], keys: tuple[str, ...]) -> object:
    """What an object names under one of these keys; its `url` counts where there is nothing else."""
    found = [item[key] for key in keys if item.get(key) is not None] or [item.get("url")]
    if any(other != found[0] for other in found[1:]):
        raise Problem("bad media reference", f"{_shown(found[0])} and {_shown(found[1])} for one medium")
    return found[0]


def read_overrides(record: Mapping[str, Any]) -> dict[str, float]:
    """Sampling settings given with a sample or a data set.

    Raises:
        Problem: no positive number.
    """
    found = {key: record[key] for key in OVERRIDES if record.get(key) is not None}
    for key in _TILES:
        if record.get(key) is not None:
            found["max_tiles"] = record[key]
    for key, value in found.items():
        types = (int, float) if key == "fps" else (int,)
        if isinstance(value, bool) or not isinstance(value, types) or not 0 < value < 1e9:
            kind = "number" if key == "fps" else "whole number"
            raise Problem("bad setting", f"{key} must be a positive {kind}, not {value!r}")
    return found


def sample_overrides(record: Mapping[str, Any], media: RecordMedia) -> dict[str, float]:
    """Sampling settings of a sample: those beside its text, and those of its videos' own parts.

    `fps` beside frames that are given one by one is their rate, not a wish.

    Raises:
        Problem: a value cannot be, the videos differ in their settings, or a rate or times stand beside
            videos whose frames are not given one by one.
    """
    lists = sum(video.frames is not None for video in media.videos)
    if not lists:
        _check_no_rate(record)
    elif record.get("fps") is not None:
        if lists < len(media.videos):
            raise Problem("bad setting", "fps beside frames that are given one by one and a video file")
        record = {key: value for key, value in record.items() if key != "fps"}
    own = media.settings
    if any(own):
        if any(settings != own[0] for settings in own):
            keys = sorted({key for settings in own for key in settings})
            raise Problem(
                UNSUPPORTED_KEY, f"{', '.join(keys)} of one video among several; give them to all alike"
            )
        record = {**record, **own[0]}
    return read_overrides(record)


def as_list(value: object) -> list[Any]:
    """A value as a list; what is empty ("", [""], null) names nothing."""
    if value in (None, "", [""], [None]):
        return []
    return value if isinstance(value, list) else [value]


def whole_text(value: str) -> str:
    """A text that can be written.

    Raises:
        Problem: half of a surrogate pair.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Problem("broken text", "half of a surrogate pair") from None
    return value


def is_frame_list(value: object) -> bool:
    """Whether a list names the frames of one video: pictures, by their suffixes or from a database."""
    return isinstance(value, list) and bool(value) and all(map(_is_picture, value))


def _is_picture(item: object) -> bool:
    if isinstance(item, dict):
        return "lmdb_key" in item
    return isinstance(item, str) and item.lower().endswith(PICTURE_SUFFIXES)


def _check_no_rate(item: Mapping[str, Any]) -> None:
    """Refuse times of frames where no frames are given one by one.

    Raises:
        Problem: there are such times.
    """
    found = [key for key in (*RATE[1:], *TIMES) if item.get(key) is not None]
    if found:
        raise Problem(UNSUPPORTED_KEY, f'"{found[0]}" where no frames are given one by one')


def _videos(value: object) -> list[Any]:
    """The videos of a key: one, several, or the frames of one."""
    return [value] if is_frame_list(value) else as_list(value)


def _times(own: Mapping[str, Any], record: Mapping[str, Any], n: int) -> tuple[Fraction, ...]:
    """Seconds of `n` frames, from their object or the record: as listed, or by their rate; () if not said."""
    for given in (own, record):
        listed = next((given[key] for key in TIMES if given.get(key) is not None), None)
        if listed is not None:
            if not isinstance(listed, list) or len(listed) != n:
                raise Problem("bad setting", f"{n} frames need as many times, not {str(listed)[:60]}")
            times = tuple(_second(value, "times") for value in listed)
            if any(b - a < _CLOSEST for a, b in zip(times, times[1:], strict=False)):
                raise Problem("bad setting", "the times of frames must ascend")
            return times
        found = next((given[key] for key in RATE[::-1] if given.get(key) is not None), None)
        if found is not None:
            rate = _second(found, "fps")
            if rate <= 0:
                raise Problem("bad setting", f"fps must be a positive number, not {found!r}")
            return tuple(k / rate for k in range(n))
    return ()


def _clips(record: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
    """What the record says of where each of its `n` videos begins and ends."""
    sides = {key: record[key] for side in _SIDES for key in _names(side) if record.get(key) is not None}
    clip = as_list(record.get("clip"))
    if not sides and not clip:
        return [{}] * n
    said = ", ".join([*sides, *(["clip"] if clip else [])])
    pairs = clip if clip and isinstance(clip[0], list) else [clip] if clip else []
    if len(pairs or [sides]) != n or (pairs and sides):
        raise Problem("bad clip", f"{said} beside {n} videos; it must be plain which part of which is meant")
    if not pairs:
        return [sides]
    if any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise Problem("bad clip", f"clip must be [start, end] in seconds, not {str(clip)[:60]}")
    return [dict(zip(_SIDES, pair, strict=True)) for pair in pairs]


def _names(side: str) -> tuple[str, ...]:
    return f"{side}_time", side, f"video_{side}"


def _side(given: tuple[Mapping[str, Any], ...], side: str) -> Fraction | None:
    """Where a clip begins or ends, by the first that says so."""
    for item in given:
        for key in _names(side):
            if item.get(key) is not None:
                return _second(item[key], f"{side}_time")
    return None


def _second(value: object, name: str) -> Fraction:
    try:
        if isinstance(value, int | float | str) and 0 <= float(value) < 1e9:  # nor "nan"
            # By its decimal digits: 0.1 must mean a tenth, or a frame at exactly that time would be lost.
            return Fraction(str(value))
    except ValueError:
        pass
    raise Problem("bad clip", f"{name} must be seconds from 0 on, not {value!r}")


def is_address(name: str) -> bool:
    """Whether a name says itself where a medium is, as those do that records bring along."""
    return is_inline(name) or is_remote(name) or member_ref(name) is not None or row_ref(name) is not None


def _is_pdf(item: object) -> bool:
    if not isinstance(item, str):
        return False
    if is_inline(item) or is_remote(item) or not is_address(item):
        return item.lower().endswith(".pdf")
    with open_bytes(item) as file:  # an address has no suffix
        return file.read(5) == b"%PDF-"
