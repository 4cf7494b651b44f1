"""A video whose frames are given one by one, as pictures: how it is named, and its clock.

Wherever a path is kept, such a video is `frames://FOLDER?NUMBER=NAME&...`: frame NUMBER (from 0) is the
picture NAME, percent-encoded and relative to FOLDER where it lies below it.  Only frames that are shown are
named.
"""

import math
import os
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from urllib.parse import quote, unquote

_SCHEME = "frames://"
_FINEST = 10**9  # parts of a second that times are rounded to, where they have no small common measure


def frame_list_name(pictures: Mapping[int, str]) -> str:
    """The name of a video that shows these pictures, by frame number."""
    folder = os.path.dirname(next(iter(pictures.values())))
    names = (f"{number}={quote(_relative(path, folder))}" for number, path in pictures.items())
    return f"{_SCHEME}{folder}?{'&'.join(names)}"


def _relative(path: str, folder: str) -> str:
    return path.removeprefix(f"{folder}/") if path.startswith(f"{folder}/") else path


@lru_cache(maxsize=256)
def frame_pictures(path: str) -> dict[int, str]:
    """The pictures of a video by frame number, or nothing if `path` names another kind of video."""
    if not path.startswith(_SCHEME):
        return {}
    folder, _, names = path.removeprefix(_SCHEME).rpartition("?")
    pairs = (name.split("=", 1) for name in names.split("&"))
    return {int(number): _absolute(unquote(name), folder) for number, name in pairs}


def _absolute(name: str, folder: str) -> str:
    return name if "://" in name else os.path.join(folder, name)


def frame_list_folder(path: str) -> str:
    """Where the pictures lie, for people to read; of another kind of video its path."""
    return path.removeprefix(_SCHEME).rpartition("?")[0] if path.startswith(_SCHEME) else path


def common_clock(times: tuple[Fraction, ...]) -> tuple[Fraction, list[int]]:
    """A time base in seconds, and ascending times in units of it.

    Times without a common measure of a nanosecond or more are rounded to nanoseconds.
    """
    parts = math.lcm(*(time.denominator for time in times))
    if parts > _FINEST:
        parts = _FINEST
    return Fraction(1, parts), [round(time * parts) for time in times]
