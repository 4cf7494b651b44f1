"""Errors that all ranks must see: one rank's refusal would leave the others waiting in a collective."""

import torch

from megatron_eagle.errors import UserError


class AgreedError(UserError):
    """A `UserError` that every rank raises with the same message, so that only rank 0 needs to print it."""


def raise_together(problem: str | None) -> None:
    """Exchange each rank's problem (None: no problem) and raise the first one, in rank order, everywhere.

    Collective over the default process group. Raises `AgreedError`.
    """
    problems: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise AgreedError(found)
