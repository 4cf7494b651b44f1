"""A benchmark's folder: its tables, and the media that they name."""

import csv
import hashlib
import json
import os
import re
import sys
from base64 import b64decode
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.files import write_whole

MIN_FRAMES = 8  # of a video, in every benchmark
_VIDEO_ENDINGS = (".mp4", ".mkv", ".webm", ".avi", ".mov")
_PICTURES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}
_TIME = re.compile(r"(?:(\d+):)?(\d+):(\d+)[.,](\d+)\s*-->\s*(?:(\d+):)?(\d+):(\d+)[.,](\d+)")


class Source:
    """The folder that holds a published benchmark.

    Media are found by the name a table gives them, wherever below the folder they lie; one that is not there
    keeps that name, and is reported when its question is asked. Pictures inside a table are written to
    `pictures`.
    """

    def __init__(self, folder: str | Path, pictures: str | Path) -> None:
        self.folder, self._pictures = Path(folder).resolve(), Path(pictures).resolve()
        self._objects: dict[str, dict[str, Any]] = {}
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder; expected the benchmark as it is published")

    def tables(self, *patterns: str) -> list[Path]:
        """The files of the first pattern that has any, in order.

        Raises:
            UserError: none has.
        """
        for pattern in patterns:
            if found := sorted(self.folder.rglob(pattern)):
                return found
        raise UserError(f"{self.folder}: none of the files {', '.join(patterns)} below this folder")

    def rows(self, *patterns: str) -> Iterator[tuple[str, Any]]:
        """(stem of its file, row) of the tables. A JSON file that is one object gives that object."""
        for path in self.tables(*patterns):
            try:
                for row in _read(path):
                    yield path.stem, row
            except (OSError, ValueError, csv.Error) as error:
                reason = (str(error).splitlines() or ["damaged"])[0]
                raise UserError(f"{path}: cannot be read as a benchmark's table: {reason}") from None

    def object(self, name: str) -> dict[str, Any]:
        """The JSON object in a file of this name; empty if there is no such file."""
        if name not in self._objects:
            found = sorted(self.folder.rglob(name))
            value = json.loads(found[0].read_text(encoding="utf-8")) if found else {}
            self._objects[name] = value if isinstance(value, dict) else {}
        return self._objects[name]

    @cached_property
    def _places(self) -> dict[str, str]:
        """Every file by its path below the folder and by the ends of that path."""
        places: dict[str, str] = {}
        for parent, _, names in sorted(os.walk(self.folder)):
            for name in sorted(names):
                path = os.path.join(parent, name)
                parts = os.path.relpath(path, self.folder).split(os.sep)
                for start in range(len(parts)):
                    places.setdefault("/".join(parts[start:]), path)
        return places

    def place(self, name: str, endings: Sequence[str] = ("",)) -> str:
        """Where the file of this name lies; with its longest known end, and one of the endings."""
        parts = [part for part in str(name).split("/") if part not in ("", ".", "..")]
        for start in range(len(parts)):
            for ending in endings:
                if found := self._places.get("/".join(parts[start:]) + ending):
                    return found
        return str(self.folder / "/".join(parts))

    def picture(self, value: Any) -> str:
        """A picture: a name, base64 text, bytes, or an object with `bytes` or `path`."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str) and "." in value:  # base64 has no dots, names of pictures have
            return self.place(value)
        if isinstance(value, str):
            value = b64decode(value, validate=True)
        if not isinstance(value, bytes):
            raise ValueError("there is no picture")
        ending = next((end for start, end in _PICTURES.items() if value.startswith(start)), ".img")
        path = self._pictures / f"{hashlib.sha256(value).hexdigest()[:24]}{ending}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, value)
        return str(path)

    def video(self, name: str, start: float | None = None, end: float | None = None) -> dict[str, Any]:
        """A video, or its part from `start` to `end` in seconds."""
        item = {"video": self.place(name, ("", *_VIDEO_ENDINGS)), "min_frames": MIN_FRAMES}
        part = {"start_time": start, "end_time": end}
        return item | {key: float(value) for key, value in part.items() if value is not None}

    def subtitles(self, name: str) -> str:
        """The text of a subtitle file (.srt, .vtt, or JSON of `line`/`text`); empty if there is none."""
        path = Path(self.place(name, (".srt", ".vtt", ".json", "_en.json", "")))
        if not path.is_file() or path.suffix not in (".srt", ".vtt", ".json"):
            return ""
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".json":
            entries = [entry.get("line") or entry.get("text") or "" for entry in json.loads(text)]
        else:
            lines = [line.strip() for line in text.splitlines()]
            shown = [line for line in lines if line and not line.isdigit() and not _TIME.search(line)]
            entries = [re.sub(r"<[^>]+>", "", line) for line in shown if line != "WEBVTT"]
        return "\n".join(dict.fromkeys(entry.strip() for entry in entries if entry.strip()))


def _read(path: Path) -> Iterator[Any]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
            yield from batch.to_pylist()
    elif path.suffix == ".tsv":
        csv.field_size_limit(sys.maxsize)  # pictures are fields
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t")
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.strip())
    elif path.suffix == ".txt":
        yield from (line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    else:
        value = json.loads(path.read_text(encoding="utf-8"))
        yield from value if isinstance(value, list) else [value]


def without_letters(options: Sequence[Any]) -> list[str]:
    """Options without the letters that some tables put before them."""
    texts = [str(option) for option in options]
    marked = [re.match(rf"\(?{chr(65 + i)}[.):]\s*(.*)", text, re.DOTALL) for i, text in enumerate(texts)]
    found = [mark[1] for mark in marked if mark is not None]
    return found if len(found) == len(texts) else texts


def letter(index: Any) -> str | None:
    """0 -> A; None where a table has no answer."""
    return None if index in (None, "") else chr(65 + int(index))


def columns(row: dict[str, Any], names: str = "ABCDEFGHIJ") -> list[str]:
    """Options that are columns A, B, ... of a row."""
    return [str(row[name]) for name in names if row.get(name) not in (None, "", "nan")]
