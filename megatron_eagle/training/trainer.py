"""The training loop: global batch -> pipeline schedule -> optimizer step -> log, checkpoint, repeat."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from torch.profiler import record_function

from megatron_eagle.checkpoint import (
    CheckpointSaver,
    TrainState,
    has_checkpoint,
    load_checkpoint,
    read_train_state,
    save_hf_folder,
)
from megatron_eagle.context_parallel.backends import choose_attention
from megatron_eagle.data.loading.loader import PackLoader
from megatron_eagle.model.flops import patch_cost
from megatron_eagle.model.inputs import InputPlan
from megatron_eagle.model.layers import choose_layers
from megatron_eagle.runtime.agreement import AgreedError, agreed
from megatron_eagle.runtime.determinism import set_deterministic
from megatron_eagle.runtime.device import Device, detect_device, process_group
from megatron_eagle.runtime.parallel import Mesh, model_parallel
from megatron_eagle.training.evaluation import HeldOut, evaluate
from megatron_eagle.training.monitoring.dataset_losses import DatasetLosses, count_datasets, read_datasets
from megatron_eagle.training.monitoring.heartbeat import Heartbeat
from megatron_eagle.training.monitoring.metrics import EvaluationMetrics
from megatron_eagle.training.monitoring.profiler import StepProfiler
from megatron_eagle.training.monitoring.run_log import RunLog
from megatron_eagle.training.monitoring.step_meter import choose_peak, measure
from megatron_eagle.training.monitoring.step_totals import StepTotals, count_totals, read_totals, zero_totals
from megatron_eagle.training.monitoring.stragglers import Stragglers
from megatron_eagle.training.optimizer import build_optimizer, build_scheduler, wrap_models
from megatron_eagle.training.resilience.failed_media import describe_failure, host_group, next_batch
from megatron_eagle.training.resilience.faults import Faults
from megatron_eagle.training.resilience.policy import LossGuard, Preempted, stop_signals
from megatron_eagle.training.run_config import RunConfig
from megatron_eagle.training.schedule import (
    TrainingBatch,
    TrainingPack,
    build_batch,
    plan_batch,
    run_schedule,
)
from megatron_eagle.training.start import start_models


def train(config: RunConfig) -> TrainState:
    """Run (or resume) `config` on the processes of this job up to its last iteration. Collective.

    `config` comes from `load_run_config`, which checks and completes it.
    Raises `UserError`: unreadable data or checkpoint, unwritable folders, a loss that its policy does not
    accept. Raises `Preempted` after a stop signal, when the checkpoint is saved.
    """
    device = detect_device()
    set_deterministic(config.training.seed)
    with (
        device.context(),
        process_group(device),
        model_parallel(config.parallel, seed=config.training.seed) as mesh,
    ):
        with agreed():  # a library that one node lacks is said once, before anything is built
            choose_libraries(config)
        loader, held_out = _open_data(config, mesh, device)
        try:
            job = _start(config, mesh, device)
            _run(job, loader, held_out)
        finally:
            loader.close()
            if held_out is not None:
                held_out.close()
        return job.state


@dataclass
class _Job:
    """Everything of a run that lives on this rank."""

    config: RunConfig
    mesh: Mesh
    device: Device
    models: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    state: TrainState
    resumed: bool  # from checkpoint.path
    guard: LossGuard
    faults: Faults
    stragglers: Stragglers
    host_group: torch.distributed.ProcessGroup | None


def _open_data(config: RunConfig, mesh: Mesh, device: Device) -> tuple[PackLoader[InputPlan], HeldOut | None]:
    """This rank's loaders; what is wrong with the data is wrong for every rank, and said once."""
    held_out, batch_size = None, config.training.global_batch_size
    open_loader = partial(
        PackLoader,
        global_batch_size=batch_size,
        data_parallel_rank=mesh.dp.rank,
        data_parallel_size=mesh.dp.size,
        plan=partial(plan_batch, config.model, mesh, device.kind == "cuda"),
        patch_cost=patch_cost(config.model),
        device=device.torch_device,
    )
    with agreed():
        loader = open_loader(config.data)
        if config.evaluation is not None:
            held_out = HeldOut(config.evaluation, config.data, batch_size, open_loader)
    return loader, held_out


def _start(config: RunConfig, mesh: Mesh, device: Device) -> _Job:
    """Build the model and give it its weights: resumed, from another checkpoint, or fresh."""
    checkpoint = config.checkpoint
    save_hf_folder(checkpoint.path, checkpoint=checkpoint.load, data=config.data.path)
    resume = has_checkpoint(checkpoint.path)
    source = checkpoint.path if resume else checkpoint.load
    models = start_models(config, mesh, device, source, load=not resume)
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
    return _Job(
        *(config, mesh, device, wrapped, optimizer, scheduler, state),
        resumed=resume,
        guard=LossGuard(config.resilience, state.recent_losses),
        faults=Faults.from_environment(torch.distributed.get_rank()),
        host_group=host_group(),
        stragglers=Stragglers(config.resilience.stragglers),
    )


def choose_libraries(config: RunConfig) -> tuple[str, str]:
    """Why layers and attention are what they are on this machine. Raises `UserError` for what is not here."""
    layers, head_dim = choose_layers(config.layers, config.model, config.parallel), config.model.text.head_dim
    attention = choose_attention(config.layers.attention, config.training.dtype, head_dim)
    return layers.reason, attention.reason


def _run(job: _Job, loader: PackLoader[InputPlan], held_out: HeldOut | None) -> None:
    config, state, settings = job.config, job.state, job.config.resilience
    last, interval = config.training.last_iteration, config.checkpoint.save_interval
    tokens = config.training.global_batch_size * config.data.length
    rank, root = torch.distributed.get_rank(), Path(config.checkpoint.path)
    logs = Path(config.logging.path or root / "logs")
    with agreed():
        log = RunLog(config.logging, logs, active=rank == 0, iteration=state.iteration, last_iteration=last)
        heart = Heartbeat(
            logs,
            rank,
            seconds=settings.heartbeat_seconds,
            hang_seconds=60 * settings.hang_minutes,
            abort=settings.abort_on_hang,
        )
    profiler = StepProfiler(config.logging.profile, logs, rank, job.models[0].config)
    saver = CheckpointSaver(config.checkpoint, log.message, state.iteration if job.resumed else None)
    peak = choose_peak(config.logging.peak_tflops, config.training.precision, job.device.torch_device)
    with log, heart, profiler, job.stragglers, stop_signals() as stop, saver:
        for reason in choose_libraries(config):
            log.message(reason)
        log.message(loader.decoder)
        log.message(peak.reason)
        for note in config.notes:
            log.message(note)
        if job.resumed:
            log.message(f"resumed from {root} at iteration {state.iteration}")
        if state.iteration >= last:
            log.message(f"nothing to do: the run ends at iteration {last}")
        while state.iteration < last:
            started = time.perf_counter()
            lr = job.scheduler.get_lr({})  # of no part's group: without its multiplier
            profiler.begin(state.iteration + 1)
            step = _step(job, loader, log, heart, stop, saver)
            seconds = time.perf_counter() - started
            profiler.end(state.iteration)
            job.stragglers.report(state.iteration, log)
            saver.poll()
            at_end = state.iteration == last
            if step.grad_norm is not None:
                log.step(
                    measure(
                        step.totals,
                        step.datasets,
                        job.device.torch_device,
                        peak_tflops=peak.tflops,
                        iteration=state.iteration,
                        loss=step.loss,
                        grad_norm=step.grad_norm,
                        lr=lr,
                        tokens=tokens,
                        seconds=seconds,
                        data_seconds=step.data_seconds,
                        first_pack=step.first_pack,
                        packs=config.training.global_batch_size,
                        data=loader.identity,
                    )
                )
            if held_out is not None and (at_end or state.iteration % config.evaluation.interval == 0):
                heart.phase(state.iteration, "evaluation")
                loss, datasets = evaluate(
                    held_out.batches(partial(_next_batch, job, log, state.iteration, [], "evaluation")),
                    held_out.datasets,
                    job.mesh,
                    job.device.torch_device,
                    partial(_schedule, job, datasets=len(held_out.datasets), forward_only=True),
                )
                log.evaluation(
                    EvaluationMetrics(state.iteration, loss, datasets.loss, datasets.share, datasets.tokens)
                )
            if at_end or step.told_to_stop or (interval and state.iteration % interval == 0):
                heart.phase(state.iteration, "save")
                _save(job, log, saver, must_succeed=at_end or step.told_to_stop)
            if step.told_to_stop and not at_end:
                raise Preempted(f"stopped by a signal after iteration {state.iteration}, which is saved")


@dataclass(frozen=True)
class _Step:
    """A finished iteration; equal on all ranks."""

    loss: float
    grad_norm: float | None  # None: the step was skipped
    totals: StepTotals
    datasets: DatasetLosses
    first_pack: int
    data_seconds: float  # that the ranks waited for the last of them to have its batches
    told_to_stop: bool  # any rank


def _step(
    job: _Job,
    loader: PackLoader[InputPlan],
    log: RunLog,
    heart: Heartbeat,
    stop: list[str],
    saver: CheckpointSaver,
) -> _Step:
    """One global batch."""
    state, guard = job.state, job.guard
    number, first_pack = state.iteration + 1, state.consumed_packs
    packs = job.config.training.global_batch_size
    heart.phase(number, "data")
    waiting = time.perf_counter()
    with record_function("data"), job.stragglers.section("data"):
        injected = job.faults.bad_media(number)
        batch = _next_batch(job, log, number, injected, "training", loader, first_pack)
    data_seconds = time.perf_counter() - waiting
    job.faults.before_step(number)
    heart.phase(number, "forward and backward")
    with job.stragglers.section("forward and backward", kernels=True):
        loss, totals, datasets, told_to_stop = _forward_backward(
            job, batch.microbatches, loader.datasets, stop
        )
    loss = job.faults.loss(number, loss)
    if batch.total:
        action, reason = guard.judge("loss", loss)
    else:
        action, reason = guard.skip("no sample of this step has weight in the loss")
    heart.phase(number, "optimizer")
    grad_norm = None
    if action == "go" and job.config.resilience.on_nonfinite == "skip":
        # The optimizer's own step would tell the norm only after it has moved the parameters.
        job.optimizer.prepare_grads()
        action, reason = guard.judge("gradient norm", float(job.optimizer.get_grad_norm()))
    if action == "go":
        with record_function("optimizer"):
            grad_norm = float(job.optimizer.step()[1])
        action, reason = guard.judge("gradient norm", grad_norm)
    if action != "go":
        kind = "skipped" if action == "skip" else "stopped"
        details = {"first_pack": first_pack, "packs": packs, "data": loader.identity.to_dict()}
        log.event(number, kind, reason, loss=loss if math.isfinite(loss) else None, **details)
    if action == "stop":
        saver.wait()
        saved = "no checkpoint" if saver.saved_iteration is None else f"iteration {saver.saved_iteration}"
        raise AgreedError(
            f"iteration {number}: {reason}; stopped ({saved} is saved). Lower optimizer.lr or "
            "optimizer.clip_grad, or look at the samples of this step (tools/train.py replay)"
        )
    if action == "go":
        guard.accept(loss)
    job.scheduler.step(1)
    state.iteration += 1
    state.consumed_packs += packs
    state.recent_losses = guard.recent
    return _Step(loss, grad_norm, totals, datasets, first_pack, data_seconds, told_to_stop)


def _forward_backward(
    job: _Job, batches: Sequence[TrainingPack], datasets: list[str], stop: list[str]
) -> tuple[float, StepTotals, DatasetLosses, bool]:
    """Gradients of one global batch, ready for the optimizer; returns its loss, what it consisted of, its
    losses by data set, and whether any rank has a name in `stop`. Equal on every rank."""
    mesh, length = job.mesh, job.config.data.length
    for model in job.models:
        model.zero_grad_buffer()
    job.optimizer.zero_grad()
    n = len(datasets)
    losses = _schedule(job, batches, n)
    counts, totals = torch.zeros(2, n, dtype=torch.float64), zero_totals(length)
    if mesh.is_reporter:  # a pack is counted once
        counts = count_datasets(batches, n)
        totals = count_totals(
            batches,
            job.config.model,
            length,
            trainable=job.config.optimizer.trainable,
            adapters=job.config.lora is not None,
        )
    stops = torch.tensor([len(stop)], dtype=torch.float64)
    sums = torch.cat([losses, torch.cat([counts.flatten(), stops, totals]).to(losses.device)])
    torch.distributed.all_reduce(sums)
    loss, by_dataset, stops, totals = sums.cpu().split([1, 3 * n, 1, len(totals)])
    found = read_totals(totals, length), read_datasets(datasets, by_dataset.tolist())
    return loss.item(), *found, stops.item() > 0


def _schedule(
    job: _Job, batches: Sequence[TrainingPack], datasets: int, *, forward_only: bool = False
) -> Tensor:
    """This rank's part of the loss of its microbatches, and of the losses by data set."""
    return run_schedule(
        job.models,
        job.mesh,
        batches,
        partial(build_batch, job.device.torch_device),
        length=job.config.data.length,
        groups=datasets,
        forward_only=forward_only,
    )


def _next_batch(
    job: _Job,
    log: RunLog,
    iteration: int,
    injected: list[int],
    of: Literal["training", "evaluation"],
    loader: PackLoader[InputPlan],
    first_pack: int,
) -> TrainingBatch:
    """A global batch, without the samples whose media fail; these go into the log."""
    policy = job.config.data.on_media_error
    batch, failed = next_batch(loader, first_pack, policy, job.host_group, injected)
    for number, medium in failed.items():
        details = {"row": medium.row, "path": medium.path, "sample": number, "of": of}
        log.event(iteration, "failed_media", describe_failure(medium), **details)
    return batch


def _save(job: _Job, log: RunLog, saver: CheckpointSaver, *, must_succeed: bool) -> None:
    try:
        job.faults.before_save(job.state.iteration)
    except AgreedError as error:
        if must_succeed:
            raise
        log.message(f"warning: {error}; training goes on")
        return
    saver.save(*(job.models, job.optimizer, job.scheduler, job.config, job.state), must_succeed=must_succeed)
