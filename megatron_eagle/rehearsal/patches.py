"""Attributes of torch that are others while a process rehearses or is recorded, and come back afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

Patch = tuple[Any, str, Any]  # (object, attribute, replacement)


@contextmanager
def applied(patches: Sequence[Patch]) -> Iterator[None]:
    """The replacements, while this is entered."""
    with ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield
