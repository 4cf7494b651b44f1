"""What a row of a table holds: one question, or many of them under a key or by their names.

A question that a row holds takes over what the row says of all its questions. What is no object is passed on
as it is, and refused where it is read.
"""

from collections.abc import Callable, Iterator
from typing import Any

Items = Callable[[Any], Iterator[Any]]


def one(row: Any) -> Iterator[Any]:
    """The row is a question."""
    yield row


def under(key: str) -> Items:
    """A row may hold a list of questions under a key."""

    def items(row: Any) -> Iterator[Any]:
        if isinstance(row, dict) and isinstance(row.get(key), list):
            common = {name: value for name, value in row.items() if name != key}
            yield from (_joined(common, item) for item in row[key])
        else:
            yield row

    return items


def by_name(flat: str, name: str) -> Items:
    """An object of questions by their names, which become their `name`; a row with the key `flat` is one."""

    def items(row: Any) -> Iterator[Any]:
        if isinstance(row, dict) and flat not in row:
            yield from (_joined({name: key}, item) for key, item in row.items())
        else:
            yield row

    return items


def of_videos(flat: str, name: str, key: str) -> Items:
    """An object of videos by their names, each with a list of questions under `key`; else as `by_name`."""
    videos, questions = by_name(flat, name), under(key)

    def items(row: Any) -> Iterator[Any]:
        for video in videos(row):
            yield from questions(video)

    return items


def _joined(common: dict[str, Any], item: Any) -> Any:
    return common | item if isinstance(item, dict) else item
