"""From the loader's batches through Megatron's pipeline schedule: planned once, put on the device once."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_eagle.data.loading.packs import GlobalBatch, LoadedPack, TokenPack
from megatron_eagle.hf_model.tiles import normalize
from megatron_eagle.model.eagle import ModelInput
from megatron_eagle.model.inputs import Balance, InputPlan, build_input, check_labels, plan_input
from megatron_eagle.model.language import Targets
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.runtime.parallel import Mesh
from megatron_eagle.training.loss import megatron_loss

T = TypeVar("T")

TrainingPack = LoadedPack[InputPlan]
TrainingBatch = GlobalBatch[InputPlan]


def plan_batch(
    eagle: EagleConfig, mesh: Mesh, pin_memory: bool, pack: TokenPack, *, step_packs: int | None = None
) -> InputPlan:
    """This rank's share of a pack, in the loader's thread.

    Args:
        step_packs: in the global batch, over which the losses of routers are a mean; None: they have none.
    Raises:
        UserError: as `plan_input` and `check_labels`.
    """
    check_labels(eagle, pack.labels, pack.loss_weights)
    balance = None
    if step_packs is not None:
        filled = torch.zeros(len(pack.input_ids), dtype=torch.bool)
        for sample in pack.samples:
            filled[sample.start : sample.end] = True
        balance = Balance(filled, step_packs)
    plan = plan_input(
        eagle,
        mesh,
        input_ids=pack.input_ids,
        document_bounds=pack.document_bounds,
        num_tiles=pack.n_tiles if mesh.pp.rank == 0 else None,
        balance=balance,
    )
    return plan.pin_memory() if pin_memory else plan


def build_batch(device: torch.device, pack: TrainingPack) -> ModelInput[Targets]:
    """A loaded pack on the device, where its bytes become pixel values. Collective as `build_input`."""
    inputs = build_input(
        pack.plan,
        device,
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        tiles=pack.pixel_values,
        targets=Targets(pack.labels, pack.loss_weights, pack.group_ids),
    )
    if inputs.vision is None:
        return inputs
    return replace(inputs, vision=replace(inputs.vision, pixel_values=normalize(inputs.vision.pixel_values)))


def run_schedule(
    models: Sequence[DistributedDataParallel],
    mesh: Mesh,
    microbatches: Sequence[T],
    build: Callable[[T], ModelInput[Targets]],
    *,
    length: int,
    groups: int = 0,
    forward_only: bool = False,
) -> Tensor:
    """Forward, and backward unless `forward_only`, of all microbatches.

    Args:
        build: called once a microbatch, when its first model chunk needs it.
        length: tokens of each microbatch.
        groups: how many losses by group there are.

    Returns:
        This rank's part of the loss and of the losses by group, fp64 [1 + groups] on the device: the sum over
        all ranks is the whole. (Of tensor parallel ranks, which know the same, the first has it.)
    """
    inputs: dict[int, ModelInput[Targets]] = {}
    uses: Counter[int] = Counter()

    def forward_step(
        numbers: Iterator[int], model: DistributedDataParallel
    ) -> tuple[Tensor, Callable[[Tensor], Any]]:
        number = next(numbers)
        if number not in inputs:
            inputs[number] = build(microbatches[number])
        mine = inputs[number]
        uses[number] += 1
        if uses[number] == len(models):  # its last chunk: what backward needs, autograd holds
            del inputs[number]
        return model(mine), lambda losses: megatron_loss(losses, mine.targets, groups)

    iterators = [iter(range(len(microbatches))) for _ in models]  # every chunk walks through all of them
    several = len(models) > 1
    parts = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if several else iterators[0],
        model=list(models) if several else models[0],
        num_microbatches=len(microbatches),
        seq_length=length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    if not (mesh.is_last_stage() and mesh.tp.rank == 0):
        return torch.zeros(1 + groups, dtype=torch.float64, device=next(models[0].parameters()).device)
    losses, by_group = zip(*parts, strict=True)
    return torch.cat([sum(losses).double().view(1), sum(by_group)])
