"""Samples whose media fail at run time: on every rank they are left out of the loss, or the run ends.

Each rank marks its failed samples among those of the global batch, whose order everyone knows from the pack
index; the marks are merged before the step by one small reduction on the host. Every rank then takes the same
weights out of the loss, also those that read no media, and the loss is that of a batch without these samples.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megatron_eagle.data.loading.packs import BatchLoader, FailedMedium, GlobalBatch, Q
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.agreement import AgreedError, raise_together
from megatron_eagle.training.monitoring.observer import Observer


def host_group() -> dist.ProcessGroup | None:
    """A group of all ranks for tensors on the host; None: the default group is one. Collective."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo", group_desc="HOST")


@dataclass(frozen=True)
class MediaPolicy:
    """What a run does about media that fail."""

    on_error: Literal["error", "skip"]
    group: dist.ProcessGroup | None  # of `host_group`

    def read(
        self,
        loader: BatchLoader[Q],
        first_pack: int,
        tell: Observer,
        iteration: int,
        of: Literal["training", "evaluation"],
        *,
        injected: Sequence[int] = (),
    ) -> GlobalBatch[Q]:
        """A global batch without the samples whose media fail; these are events. As `next_batch`."""
        batch, failed = next_batch(loader, first_pack, self.on_error, self.group, injected)
        for number, medium in failed.items():
            where = {"row": medium.row, "path": medium.path, "sample": number, "of": of}
            tell.event(iteration, "failed_media", describe_failure(medium), **where)
        return batch


def next_batch(
    loader: BatchLoader[Q],
    first_pack: int,
    policy: Literal["error", "skip"],
    group: dist.ProcessGroup | None,
    injected: Sequence[int] = (),
) -> tuple[GlobalBatch[Q], dict[int, FailedMedium]]:
    """`loader.step`, with the samples left out whose media failed on any rank; which, by their numbers in the
    global batch, and why. Collective.

    Args:
        group: of `host_group`.
        injected: numbers of samples that count as failed on this rank, for tests.
    Raises:
        AgreedError: an error of any rank's loader, or failed media under the policy `error`.
    """
    problem = batch = None
    failures: dict[int, FailedMedium] = {}
    try:
        batch = loader.step(first_pack)
        failures |= batch.failures
    except UserError as error:
        problem = str(error)
    failures |= {number: FailedMedium(-1, "none", "none", "a fault for tests") for number in injected}
    failed = merge_marks(loader.n_samples(first_pack), failures, problem, group)
    assert batch is not None, "a rank without a batch has a problem, which ends all of them above"
    if not failed:
        return batch, {}
    of_ranks: list[dict[int, FailedMedium]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, failures, group=group)
    first = {number: medium for found in reversed(of_ranks) for number, medium in found.items()}
    if policy == "error":
        more = f" (and {len(failed) - 1} more samples)" if len(failed) > 1 else ""
        raise AgreedError(
            f"{describe_failure(first[failed[0]])}{more}. "
            "Repair it, or set data.on_media_error=skip to train without such samples"
        )
    return loader.leave_out(batch, set(failed)), {number: first[number] for number in failed}


def merge_marks(
    n_samples: int, failures: Collection[int], problem: str | None, group: dist.ProcessGroup | None
) -> list[int]:
    """All ranks' failed samples, as numbers below `n_samples`. Collective.

    Raises:
        AgreedError: a rank has a problem.
    """
    marks = torch.zeros(n_samples + 1, dtype=torch.uint8)  # the last: a problem
    marks[list(failures)] = 1
    marks[-1] = problem is not None
    dist.all_reduce(marks, dist.ReduceOp.MAX, group=group)
    if marks[-1]:
        raise_together(problem)
    return marks.nonzero().flatten().tolist()


def describe_failure(medium: FailedMedium) -> str:
    """One line: what failed and where it is used."""
    return f"{medium.reason}; used by row {medium.row} of the store ({medium.source})"
