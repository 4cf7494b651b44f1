"""Every number that a configuration takes, found by walking the type hints of its dataclasses."""

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from megatron_eagle.ranges import Range


@dataclass(frozen=True)
class NumericField:
    """`place` is dotted; `*` stands for any key of a mapping or item of a list."""

    place: str
    kind: type
    range: Range | None

    @property
    def edges(self) -> list[float]:
        """Both ends of the range, the next values beyond them, and what is written by mistake."""
        low, high = self.range.low, self.range.high
        if self.kind is int:
            values = [low, high, low - 1, high + 1, 0, -1, 2**31, 10**30, 10**5000]
        else:
            beyond = math.nextafter(low, -math.inf), math.nextafter(high, math.inf)
            values = [low, high, *beyond, 0.0, -1.0, 5e-324, 1e300, -math.inf, 10**400]
        return [*dict.fromkeys(values), math.nan]


def numeric_fields(hint: Any, place: str = "") -> Iterator[NumericField]:
    """The numbers in a value of the type `hint`; true and false are none."""
    arguments, legal = typing.get_args(hint), None
    if typing.get_origin(hint) is Annotated:
        legal = next((extra for extra in arguments[1:] if isinstance(extra, Range)), None)
        hint, arguments = arguments[0], ()
    if hint in (int, float):
        yield NumericField(place, hint, legal)
    elif dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint, include_extras=True)
        for name, inner in ((field.name, hints[field.name]) for field in dataclasses.fields(hint)):
            yield from numeric_fields(inner, f"{place}.{name}" if place else name)
    elif typing.get_origin(hint) is not typing.Literal:
        several = typing.get_origin(hint) in (dict, list, tuple)
        for argument in arguments:
            yield from numeric_fields(argument, f"{place}.*" if several else place)
