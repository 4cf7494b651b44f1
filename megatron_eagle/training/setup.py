"""What a run trains with on this rank, built in order: device, groups, data, model, optimizer."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_eagle.checkpoint import (
    HF_FOLDER,
    TrainState,
    has_checkpoint,
    load_checkpoint,
    read_train_state,
    save_hf_folder,
)
from megatron_eagle.context_parallel.backends import choose_attention
from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.loading.packs import BatchLoader, TokenPack
from megatron_eagle.errors import UserError
from megatron_eagle.model.flops import patch_cost, training_flops
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.inputs import InputPlan
from megatron_eagle.model.layers import choose_layers
from megatron_eagle.runtime.agreement import agreed
from megatron_eagle.runtime.device import Device
from megatron_eagle.runtime.parallel import Mesh
from megatron_eagle.training.evaluation import HeldOut
from megatron_eagle.training.monitoring.metrics import EVENTS_FILE, METRICS_FILE
from megatron_eagle.training.monitoring.step_meter import PeakChoice, choose_peak
from megatron_eagle.training.optimizer import build_optimizer, build_scheduler, check_fused_adam, wrap_models
from megatron_eagle.training.resilience.failed_media import MediaPolicy, host_group
from megatron_eagle.training.resilience.faults import Faults
from megatron_eagle.training.resilience.owner import Ownership
from megatron_eagle.training.resilience.policy import LossGuard
from megatron_eagle.training.resilience.waiting import DataWait
from megatron_eagle.training.run_config import RunConfig
from megatron_eagle.training.schedule import plan_batch
from megatron_eagle.training.start import Initialize, start_models, start_ranks


class OpenLoader(Protocol):
    """Opens a rank's loader, as `PackLoader` does."""

    def __call__(
        self,
        config: DataConfig,
        /,
        *,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        plan: Callable[[TokenPack], InputPlan],
        patch_cost: float,
        device: torch.device,
    ) -> BatchLoader[InputPlan]: ...


@dataclass(frozen=True)
class Run:
    """Everything of a run that lives on this rank."""

    config: RunConfig
    mesh: Mesh
    device: Device
    loader: BatchLoader[InputPlan]
    held_out: HeldOut | None
    models: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    state: TrainState  # moves on with every step
    resumed: bool  # from checkpoint.path
    guard: LossGuard
    media: MediaPolicy
    faults: Faults
    peak: PeakChoice
    owner: Ownership  # of the folder
    waiting: DataWait | None = None  # for data that are still being made

    @property
    def logs(self) -> Path:
        """The folder of its logs."""
        return logs_folder(self.config)


@contextmanager
def open_run(
    config: RunConfig,
    open_loader: OpenLoader = PackLoader,
    *,
    initialize: Initialize = initialize_parameters,
) -> Iterator[Run]:
    """Build `config` on the processes of this job, resumed where its checkpoint stands. Collective.

    At the end, also after an error, the data are closed and groups and device are what they were.

    Args:
        initialize: gives fresh weights their values.

    Raises:
        UserError: unreadable data or checkpoint, a library that is not there, unwritable folders, a
            folder that another run writes into.
    """
    with start_ranks(config) as (device, mesh), ExitStack() as held:
        owner = Ownership(config.checkpoint.path, active=torch.distributed.get_rank() == 0)
        with agreed():  # what one node lacks is said once, before anything is built or written
            choose_libraries(config)
            check_new_logs(config)
            held.enter_context(owner)
        with open_data(config, mesh, device, open_loader) as (loader, held_out):
            yield _build(config, mesh, device, loader, held_out, initialize, owner)


@contextmanager
def open_data(
    config: RunConfig, mesh: Mesh, device: Device, open_loader: OpenLoader
) -> Iterator[tuple[BatchLoader[InputPlan], HeldOut | None]]:
    """This rank's loaders; what is wrong with the data is wrong for every rank, and said once."""
    batch_size = config.training.global_batch_size
    open_one = partial(
        open_loader,
        global_batch_size=batch_size,
        data_parallel_rank=mesh.dp.rank,
        data_parallel_size=mesh.dp.size,
        plan=partial(
            plan_batch,
            config.model,
            mesh,
            device.kind == "cuda",
            step_packs=config.training.global_batch_size,
        ),
        patch_cost=patch_cost(config.model),
        device=device.torch_device,
    )
    with ExitStack() as opened:
        held_out = None
        with agreed():
            loader = open_one(config.data)
            opened.callback(loader.close)
            if config.evaluation is not None:
                held_out = HeldOut(config.evaluation, config.data, batch_size, open_one)
                opened.callback(held_out.close)
        yield loader, held_out


def _build(
    config: RunConfig,
    mesh: Mesh,
    device: Device,
    loader: BatchLoader[InputPlan],
    held_out: HeldOut | None,
    initialize: Initialize,
    owner: Ownership,
) -> Run:
    """Give the model its weights: resumed, from another checkpoint, or fresh."""
    checkpoint = config.checkpoint
    save_hf_folder(checkpoint.path, checkpoint=checkpoint.load, data=config.data.folder)
    resume = has_checkpoint(checkpoint.path)
    source = checkpoint.path if resume else checkpoint.load
    models = start_models(config, mesh, device, source, load=not resume, initialize=initialize)
    wrapped = wrap_models(models)
    optimizer = build_optimizer(config.optimizer, wrapped)
    scheduler = build_scheduler(config.optimizer, optimizer, config.training.train_iterations)
    state = TrainState()
    if resume:
        state = load_checkpoint(
            checkpoint.path,
            models=wrapped,
            optimizer=optimizer,
            scheduler=scheduler,
            verify_files=checkpoint.verify,
        )
    elif source is not None:
        state.started_from = read_train_state(source).iteration
    with agreed():
        _go_on(config, loader, state)
    group = host_group()
    return Run(
        config,
        mesh,
        device,
        loader,
        held_out,
        wrapped,
        optimizer,
        scheduler,
        state,
        resumed=resume,
        guard=LossGuard(config.resilience, state.recent_losses),
        media=MediaPolicy(config.data.on_media_error, group),
        faults=Faults.from_environment(torch.distributed.get_rank()),
        peak=choose_peak(config.logging.peak_tflops, config.training.precision, device.torch_device),
        owner=owner,
        waiting=_waiting(config, loader, group),
    )


def _go_on(config: RunConfig, loader: BatchLoader[InputPlan], state: TrainState) -> None:
    """Let a loader that follows its data begin where the run has read last.

    Raises:
        UserError: the run read its data in another order.
    """
    follow, read = config.data.follow, state.read
    if not state.consumed_packs or (follow is None and read is None):
        return
    if follow is None or read is None:
        how = "with" if follow is None else "without"
        raise UserError(
            f"{config.checkpoint.path}: this run has read its data {how} data.follow, and goes on so; "
            f"another run may start from its weights (checkpoint.load={config.checkpoint.path})"
        )
    assert isinstance(loader, PackLoader), "no other follows"
    loader.go_on(read.data, read.first_pack, read.packs)


def _waiting(
    config: RunConfig, loader: BatchLoader[InputPlan], group: torch.distributed.ProcessGroup | None
) -> DataWait | None:
    follow = config.data.follow
    if follow is None:
        return None
    assert isinstance(loader, PackLoader), "no other follows"
    assert loader.followed is not None, "it was asked to"
    count = config.training.global_batch_size
    return DataWait(loader.followed, config.data.path, count, follow.dead_after_minutes, group)


def choose_libraries(config: RunConfig) -> tuple[str, str]:
    """Why layers and attention are what they are on this machine.

    Raises:
        UserError: something that is asked for is not here.
    """
    check_fused_adam(config.optimizer)
    layers, head_dim = choose_layers(config.layers, config.model, config.layout), config.model.text.head_dim
    attention = choose_attention(config.layers.attention, config.training.dtype, head_dim)
    length = config.data.length
    flops = training_flops(config.model, tokens=length, sum_squared_lengths=length**2, tiles=0)
    share = flops.language_attention / (flops.language_attention + flops.language_linear)
    of_step = f"; of a pack of one document it is {100 * share:.0f} % of the language model's FLOPs"
    return layers.reason, attention.reason + of_step


def logs_folder(config: RunConfig) -> Path:
    """Where the run logs."""
    return Path(config.logging.path or Path(config.checkpoint.path) / "logs")


def check_new_logs(config: RunConfig) -> None:
    """Refuse a run that has never started, with logs that are there already: it would begin them anew.

    Logs in `checkpoint.path` are its own; so are those of a run that was killed before its first checkpoint.

    Raises:
        UserError: `logging.path` holds the logs of another run.
    """
    logs, root = logs_folder(config), Path(config.checkpoint.path)
    started = has_checkpoint(root) or (root / HF_FOLDER).exists()
    if started or config.logging.path is None:
        return
    if any(file.is_file() and file.stat().st_size for file in (logs / METRICS_FILE, logs / EVENTS_FILE)):
        raise UserError(
            f"logging.path: {logs} holds the logs of another run than that of {root}, which is yet to begin "
            "and would drop their lines: name another folder, or move them away"
        )
