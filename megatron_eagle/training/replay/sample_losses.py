"""Loss and gradient norm of each sample of a global batch, under any layout.

A sample's loss is its share of the batch's: sum(w x loss) over its tokens, with the normaliser of the batch.
All come from one forward pass of the packs as training runs them, with a group for each sample. Its gradient
is that of this share alone. Documents of a pack do not see each other, so it is formed from the sample in a
pack of its own: all samples together have the tokens of the batch once more. Data parallel ranks do not wait
for each other: each does the samples of its packs.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_eagle.data.loading.loader import PackLoader
from megatron_eagle.data.loading.packs import FailedMedium
from megatron_eagle.model.inputs import InputPlan
from megatron_eagle.model.layout_rules import pack_multiple
from megatron_eagle.runtime.parallel import Mesh
from megatron_eagle.training.schedule import TrainingBatch, TrainingPack, build_batch, run_schedule

_PIECE = 1 << 24  # elements of a gradient that are squared at a time


def sample_losses(
    models: Sequence[DistributedDataParallel],
    mesh: Mesh,
    microbatches: Sequence[TrainingPack],
    n_samples: int,
    *,
    length: int,
    device: torch.device,
) -> list[float]:
    """The loss of every sample of the global batch, by its number; 0 for those without weight. Collective.

    `microbatches` are this rank's, of `length` tokens.
    """
    by_sample = []
    for pack in microbatches:
        numbers = torch.zeros_like(pack.group_ids)
        for sample in pack.samples:
            numbers[sample.start : sample.end] = sample.number
        by_sample.append(replace(pack, group_ids=numbers))
    with torch.no_grad():
        losses = run_schedule(
            models,
            mesh,
            by_sample,
            partial(build_batch, device),
            length=length,
            groups=n_samples,
            forward_only=True,
        )
    torch.distributed.all_reduce(losses)
    return losses[1:].tolist()


def backward_each(
    models: Sequence[DistributedDataParallel],
    mesh: Mesh,
    loader: PackLoader[InputPlan],
    batch: TrainingBatch,
    left_out: Collection[int],
    device: torch.device,
) -> Iterator[tuple[int, dict[int, FailedMedium]]]:
    """Forward and backward of one sample of this data parallel rank after the other, with its weights in the
    batch; gives each one's number when the gradients are there, and what of its media could not be read.

    `models` are wrapped without `across_replicas`. The gradients of a sample are in `main_grad`, as an
    optimizer that does not shard its state would find them, until the next one is asked for. Collective over
    the ranks of a replica.
    """
    multiple = pack_multiple(mesh.config)
    for pack in batch.microbatches:
        for sample in pack.samples:
            if sample.number in left_out:
                continue
            length = -(-(sample.end - sample.start) // multiple) * multiple
            for model in models:
                model.zero_grad_buffer()
            alone, failures = loader.alone(batch, sample.number, length)
            run_schedule(models, mesh, [alone], partial(build_batch, device), length=length)
            yield sample.number, failures


def gradient_norm(models: Sequence[DistributedDataParallel], mesh: Mesh) -> float:
    """L2 norm of the gradients that `backward_each` leaves, each parameter counted once. Collective over the
    ranks of a replica."""
    square = torch.zeros(1, dtype=torch.float64, device=next(models[0].parameters()).device)
    for model in models:
        for parameter in model.parameters():
            copied = not param_is_not_tensor_parallel_duplicate(parameter, mesh.tp.group)
            if not getattr(parameter, "allreduce", True):  # an expert's, whole on each rank perhaps
                copied = mesh.expt_tp.size < mesh.tp.size and mesh.tp.rank > 0
            if parameter.requires_grad and param_is_not_shared(parameter) and not copied:
                for piece in parameter.main_grad.view(-1).split(_PIECE):
                    square += piece.double().square().sum()
    torch.distributed.all_reduce(square, group=mesh.groups.mp)
    return square.sqrt().item()


def gather_norms(norms: dict[int, float], n_samples: int, mesh: Mesh, device: torch.device) -> list[float]:
    """Every rank's norms by number of the sample. Collective."""
    found = torch.zeros(n_samples, dtype=torch.float64, device=device)
    if mesh.speaks_for_replica:
        found[list(norms)] = torch.tensor(list(norms.values()), dtype=torch.float64, device=device)
    torch.distributed.all_reduce(found)
    return found.tolist()
