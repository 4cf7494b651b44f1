"""A benchmark's folder: its tables, and the media that they name."""

import filecmp
import hashlib
import os
from base64 import b64decode
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_eagle.data.media.source import fingerprint, open_bytes, row_ref
from megatron_eagle.errors import UserError
from megatron_eagle.evaluation.published import held, shown
from megatron_eagle.evaluation.published.subtitles import read_subtitle_file
from megatron_eagle.evaluation.published.tables import read_table
from megatron_eagle.files import write_whole
from megatron_eagle.hf_model.subtitles import Subtitle

_VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".MP4")
_PICTURES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}


class Source:
    """The folder that holds a published benchmark.

    Media are found by the name a table gives them, wherever below the folder they lie, also behind links; of
    several of one name that counts which has most of the folders before it in its path, else that nearest to
    the table. What lies in a tar or zip archive is found as if it were unpacked, and is its address. One that
    is not there keeps that name, and is reported when its question is asked. Pictures inside a table are
    written to `pictures`, indices of archives beside it.

    Args:
        fps, max_frames: how videos will be sampled; subtitles and several videos' frames depend on it.
    """

    def __init__(
        self, folder: str | Path, pictures: str | Path, fps: float = 2.0, max_frames: int | None = None
    ) -> None:
        self.folder, self._pictures = Path(folder).resolve(), Path(pictures).resolve()
        self._cache = self._pictures.parent / "archives"
        self.fps, self.max_frames = fps, max_frames
        self.table: Path | None = None
        self._objects: dict[str, dict[str, Any]] = {}
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; expected the benchmark as it is published")

    def tables(self, *patterns: str) -> list[Path]:
        """The files of the first pattern that has any, in order.

        Raises:
            UserError: none has.
        """
        for pattern in patterns:
            kinds = pattern.split("|")
            if found := [self.folder / name for name in self._files if _matches(name, kinds)]:
                return found
        listed = ", ".join(pattern.replace("|", " or ") for pattern in patterns)
        raise UserError(f"{self.folder}: none of the files {listed} below this folder")

    def rows(self, path: Path) -> Iterator[Any]:
        """The rows of a table. A JSON file that is one object gives that object.

        Raises:
            UserError: it cannot be read, or an archive beside it is damaged.
        """
        self.table = path
        _ = self._places
        yield from read_table(path)

    def object(self, name: str) -> dict[str, Any]:
        """The JSON object in a file of this name; empty if there is no such file.

        Raises:
            UserError: the file holds no JSON.
        """
        if name not in self._objects:
            found = [self.folder / one for one in self._files if PurePosixPath(one).name == name]
            value: Any = next(iter(read_table(found[0])), {}) if found else {}
            self._objects[name] = value if isinstance(value, dict) else {}
        return self._objects[name]

    @cached_property
    def _files(self) -> list[str]:
        """Every file by its path below the folder, once also if links lead to it again.

        Left out are hidden folders (a download's own notes), and folders of evaluations.
        """
        found, seen = [], set()
        for parent, folders, names in os.walk(self.folder, followlinks=True):
            real = os.path.realpath(parent)
            if real in seen or real in (str(self._pictures), str(self._cache)) or "answers.jsonl" in names:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
            found += [os.path.relpath(os.path.join(parent, name), self.folder) for name in names]
        return sorted(name.replace(os.sep, "/") for name in found)

    @cached_property
    def _held(self) -> dict[str, str]:
        """The addresses of what lies in archives, by its path where it would be unpacked; but for what is."""
        found: dict[str, str] = {}
        for name in filter(held.is_archive, self._files):
            found |= held.members(self.folder, name, self._cache)
        for name in self._files:
            found.pop(name, None)
        return found

    @cached_property
    def _places(self) -> dict[str, list[str]]:
        """Every file by the ends of its path."""
        places: dict[str, list[str]] = {}
        for name in [*self._files, *self._held]:
            parts = name.split("/")
            for start in range(len(parts)):
                places.setdefault("/".join(parts[start:]), []).append(name)
        return places

    def place(self, name: str, endings: Sequence[str] = ("",), whole: bool = False) -> str:
        """Where the file of this name lies; with its longest known end, and one of the endings.

        Args:
            whole: no shorter end will do: other files of the benchmark have the same name.

        Raises:
            ValueError: several lie equally near, and are not the same.
        """
        parts = [part for part in str(name).split("/") if part not in ("", ".", "..")]
        for start in range(1 if whole else len(parts)):
            for ending in endings:
                if found := self._places.get("/".join(parts[start:]) + ending):
                    name = self._nearest(found)
                    return self._held.get(name) or str(self.folder / name)
        return str(self.folder / "/".join(parts))

    def _nearest(self, found: list[str]) -> str:
        if len(found) == 1 or self.table is None:
            return found[0]
        near = os.path.relpath(self.table, self.folder).split(os.sep)
        shared = {name: len(os.path.commonprefix([name.split("/"), near])) for name in found}
        best = [name for name in found if shared[name] == max(shared.values())]
        for other in best[1:]:
            if not self._same(best[0], other):
                raise ValueError(f"{best[0]} and {other} have the same name; which one is meant is not said")
        return best[0]

    def _same(self, one: str, other: str) -> bool:
        if one in self._held or other in self._held:
            prints = [fingerprint(self._held.get(name) or str(self.folder / name)) for name in (one, other)]
            return prints[0] == prints[1]
        return filecmp.cmp(self.folder / one, self.folder / other, shallow=False)

    def picture(self, value: Any, whole: bool = False) -> str:
        """A picture: a name (`whole` as of `place`), the address of a value in a table, base64, or bytes.

        Raises:
            ValueError: it is none of these.
        """
        if isinstance(value, str) and row_ref(value):
            with open_bytes(value) as file:
                value = file.read()
        if isinstance(value, str) and "." in value:  # base64 has no dots, names of pictures have
            return self.place(value, whole=whole)
        if isinstance(value, str):
            value = b64decode(value, validate=True)
        if not isinstance(value, bytes) or not value:
            raise ValueError("there is no picture")
        ending = next((end for start, end in _PICTURES.items() if value.startswith(start)), ".img")
        path = self._pictures / f"{hashlib.sha256(value).hexdigest()[:24]}{ending}"
        if not path.exists() or path.stat().st_size != len(value):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, value, durable=False)  # thousands; what a loss of power leaves is written anew
        return str(path)

    def video(self, name: str, start: float | None = None, end: float | None = None) -> dict[str, Any]:
        """A video, or its part from `start` to `end` in seconds."""
        item = {"video": self.place(name, ("", *_VIDEO_ENDINGS)), "min_frames": shown.MIN_FRAMES}
        part = {"start_time": start, "end_time": end}
        return item | {key: float(value) for key, value in part.items() if value is not None}

    def frame(self, name: str, at: float) -> dict[str, Any]:
        """The one frame of a video at a time in seconds."""
        path = self.place(name, ("", *_VIDEO_ENDINGS))
        start, end = shown.moment(path, at)
        return {"video": path, "start_time": start, "end_time": end, "nframes": 1}

    def frame_times(self, video: dict[str, Any]) -> list[float]:
        """When the frames of a video are that will be shown; none if it cannot be looked at."""
        return shown.frame_times(video, self.fps, self.max_frames)

    def subtitles(self, name: str, seconds: float | None = None) -> list[Subtitle]:
        """The subtitles in the file of this name, as `read_subtitle_file`."""
        return read_subtitle_file(self.place(name, (".srt", ".vtt", ".json", "_en.json", "")), seconds)


def _matches(name: str, kinds: Sequence[str]) -> bool:
    return any(PurePosixPath(name).match(kind) for kind in kinds)
