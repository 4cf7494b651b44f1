"""Names of the store's own media: relative to the store in its rows, absolute for whoever reads them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_eagle.data.media.frame_list import frame_list_name, frame_pictures
from megatron_eagle.data.media.source import page_ref

FOLDER = "media"
_OWN = f"tar://{FOLDER}/"


def is_own(path: str) -> bool:
    """Whether a name is relative to the store that has it, be it a medium's, its page's or that of a video's
    pictures."""
    if page := page_ref(path):
        return is_own(page.file)
    return path.startswith(_OWN) or any(map(is_own, frame_pictures(path).values()))


def absolute(path: str, store: Path) -> str:
    """What a row of a store names, as `media.source` reads it."""
    return renamed(path, lambda own: f"tar://{store.absolute()}/{own.removeprefix('tar://')}", is_own)


def renamed(path: str, name: Callable[[str], str], which: Callable[[str], bool]) -> str:
    """A medium's name where some media get other names, be it one of them, a page of one, or a video that
    shows them as its frames."""
    if page := page_ref(path):
        return str(replace(page, file=renamed(page.file, name, which)))
    pictures = frame_pictures(path)
    if not pictures:
        return name(path) if which(path) else path
    if not any(map(which, pictures.values())):
        return path
    return frame_list_name({number: name(one) if which(one) else one for number, one in pictures.items()})
