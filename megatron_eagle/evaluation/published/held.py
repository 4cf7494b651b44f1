"""Media in a download's archives: found by name as if they were unpacked, made files when they are asked."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_eagle.data.annotations.roots import open_archive
from megatron_eagle.data.media.source import member_ref, open_bytes
from megatron_eagle.errors import UserError
from megatron_eagle.files import beside
from megatron_eagle.inference.generate import Request
from megatron_eagle.problems import Problem

_ARCHIVES = (".tar", ".zip", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_archive(name: str) -> bool:
    """Whether a file is an archive by its name."""
    return name.lower().endswith(_ARCHIVES)


def members(folder: Path, name: str, cache: Path) -> Iterator[tuple[str, str]]:
    """(name, address) of what an archive holds, named as if it were unpacked where it lies.

    Args:
        name: of the archive below `folder`.
        cache: keeps its index, and what is in it if it is a packed tar archive.

    Raises:
        UserError: it is damaged, or no archive.
    """
    index = open_archive(str(folder / name), str(cache))
    place = os.path.dirname(name)
    for number in range(len(index)):
        if not index.refused(number):
            yield os.path.join(place, index.name(number)), index.address(number)


class LocalMedia:
    """Requests whose media are files: what lies in an archive is written to `folder`, and what the last
    request had stays there until another one does without it, or `close`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._there = folder, set[Path]()

    def __enter__(self) -> "LocalMedia":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, request: Request) -> Request:
        """The request with files for addresses.

        Raises:
            UserError: an archive has changed or is damaged, or the file cannot be written.
        """
        needed: set[Path] = set()
        images = tuple(self._file(path, needed) for path in request.images)
        videos = tuple(self._video(video, needed) for video in request.videos)
        for path in self._there - needed:
            path.unlink(missing_ok=True)
        self._there = needed
        return replace(request, images=images, videos=videos)

    def close(self) -> None:
        """Remove the files."""
        for path in self._there:
            path.unlink(missing_ok=True)
        self._there = set()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _video(self, video: str | dict[str, Any], needed: set[Path]) -> str | dict[str, Any]:
        if isinstance(video, str):
            return self._file(video, needed)
        return video | {"video": self._file(video["video"], needed)} if "video" in video else video

    def _file(self, path: str, needed: set[Path]) -> str:
        if member_ref(path) is None:
            return path
        target = self._folder / hashlib.sha256(path.encode()).hexdigest()[:24]
        needed.add(target)
        if target not in self._there:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                partial = beside(target, durable=False)
                with open_bytes(path) as member, partial as beginning, beginning.open("wb") as file:
                    shutil.copyfileobj(member, file, 1 << 20)
            except (Problem, OSError) as error:
                raise UserError(str(error)) from None
            self._there.add(target)
        return str(target)
