"""Ranges of numbers in configurations, each declared beside its field and checked wherever one is made.

    lr: Annotated[float, Range(0, 1)] = 2e-5

A dataclass that inherits from `Ranged` refuses a number outside its range, made from a file
(`config.from_dict`, which adds the dotted place) or in Python. Ranges are wide: they keep out what cannot
train, not what is unusual. Rules between fields are their owners'.
"""

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """Both ends belong to it. `or_zero`: so does 0, which switches something off. `why` ends the refusal."""

    low: float
    high: float
    or_zero: bool = False
    why: str = ""

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high or (self.or_zero and value == 0)

    def __str__(self) -> str:
        """What a value must be."""
        legal = f"lie between {_show(self.low)} and {_show(self.high)}"
        if self.low == self.high:
            legal = f"be {_show(self.low)}"
        return f"must {'be 0 or ' if self.or_zero else ''}{legal}{f': {self.why}' if self.why else ''}"


class Ranged:
    """Base of a dataclass with declared ranges; one with rules of its own calls `super().__post_init__()`.

    Raises:
        ValueError: field, value and range.
    """

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            for place, value, legal in _numbers(hint, getattr(self, name), name):
                if value not in legal:
                    raise ValueError(f"{place} is {value}: {legal}")


def _numbers(hint: Any, value: Any, place: str) -> Iterator[tuple[str, float, Range]]:
    """The numbers in `value` that the type `hint` declares a range for, each with its place."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if value is None:
        return
    if origin is Annotated:
        yield from ((place, value, extra) for extra in arguments[1:] if isinstance(extra, Range))
    elif origin is dict:
        for key, item in value.items():
            yield from _numbers(arguments[1], item, f"{place}.{key}")
    elif origin in (list, tuple):  # list[X] or tuple[X, ...]
        for i, item in enumerate(value):
            yield from _numbers(arguments[0], item, f"{place}[{i}]")
    elif origin in (typing.Union, types.UnionType):  # with None
        for member in arguments:
            yield from _numbers(member, value, place)


def _show(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
