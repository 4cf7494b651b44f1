"""Pages of PDF files: `pdf://FILE?page=NUMBER&size=WxH`, drawn at W x H pixels; FILE is any address."""

import re
from dataclasses import dataclass

_PAGE = re.compile(r"pdf://(?P<file>.+)\?page=(?P<number>\d+)&size=(?P<width>\d+)x(?P<height>\d+)", re.DOTALL)


@dataclass(frozen=True)
class PageRef:
    """Page `number` (from 0) of a PDF file, drawn at `width` x `height` pixels."""

    file: str
    number: int
    width: int
    height: int

    def __str__(self) -> str:
        """Its name, in which pages are numbered from 1."""
        return f"pdf://{self.file}?page={self.number + 1}&size={self.width}x{self.height}"


def page_ref(path: str) -> PageRef | None:
    """The page that `path` names, or None if it names none."""
    match = _PAGE.fullmatch(path)
    return match and PageRef(
        match["file"], int(match["number"]) - 1, int(match["width"]), int(match["height"])
    )
