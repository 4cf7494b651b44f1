"""Errors that all ranks must see: one rank's refusal would leave the others waiting in a collective."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_eagle.errors import UserError


class AgreedError(UserError):
    """A `UserError` that every rank raises with the same message, so that only rank 0 needs to print it."""


def raise_together(problem: str | None, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Exchange each rank's problem (None: no problem) and raise the first one, in rank order, everywhere.

    Collective over `group` (None: all ranks).

    Raises:
        AgreedError: a rank has a problem.
    """
    problems: list[str | None] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(problems, problem, group)
    for found in problems:
        if found is not None:
            raise AgreedError(found)


@contextmanager
def agreed() -> Iterator[None]:
    """A `UserError` that the block raises on any rank is raised on all of them. Collective over all ranks."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    raise_together(problem)


def gather_to_first(value: Any, group: torch.distributed.ProcessGroup | None = None) -> list[Any]:
    """On rank 0 every rank's `value`, in rank order; elsewhere nothing. Collective over `group` of all."""
    gathered = [None] * torch.distributed.get_world_size(group)
    torch.distributed.gather_object(value, gathered if torch.distributed.get_rank() == 0 else None, 0, group)
    return gathered if torch.distributed.get_rank() == 0 else []
