"""A past global batch again: its samples, and under a checkpoint each one's loss and gradient norm.

The logs say which batch it was (`history`), and the store is refused if it is not the one that was read. The
weights are those of any checkpoint, under its own settings and any layout; those of the iteration before give
the losses of the step itself.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from tqdm import tqdm

from megatron_eagle.checkpoint import checkpoint_folder, read_train_state, saved_iterations
from megatron_eagle.config import apply_overrides, from_dict, load_yaml
from megatron_eagle.data.loading.batch import sample_weight
from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.loading.packs import FailedMedium, Q, no_tiles
from megatron_eagle.data.store.reader import Rows
from megatron_eagle.data.store.shards import store_folder
from megatron_eagle.errors import UserError
from megatron_eagle.model.inputs import InputPlan
from megatron_eagle.runtime.agreement import agreed, raise_together
from megatron_eagle.runtime.device import Device
from megatron_eagle.runtime.parallel import Mesh
from megatron_eagle.training.optimizer import wrap_models
from megatron_eagle.training.replay.history import History, PastStep
from megatron_eagle.training.replay.sample_losses import (
    backward_each,
    gather_norms,
    gradient_norm,
    sample_losses,
)
from megatron_eagle.training.resilience.failed_media import describe_failure, host_group, next_batch
from megatron_eagle.training.run_config import RunConfig, complete_run_config
from megatron_eagle.training.schedule import plan_batch
from megatron_eagle.training.start import start_models, start_ranks

# How far the samples' losses may add up to something else than the logged loss, relatively.
LOSS_TOLERANCE = {"fp32": 1e-6, "bf16": 1e-2}


@dataclass(frozen=True)
class PastSample:
    """A sample of the batch, and what it did to the step."""

    number: int  # in the global batch
    pack: int  # of the index
    row: int  # of the store
    dataset: str
    file: str
    line: int
    n_tokens: int
    n_supervised: int
    share: float  # of the batch's weight; 0 if it was left out
    left_out: str | None  # why
    loss: float | None = None  # its share of the batch's loss; None: no checkpoint was asked
    grad_norm: float | None = None  # of that share

    @property
    def mean_loss(self) -> float | None:
        """Of its tokens, by their weight."""
        return None if self.loss is None or not self.share else self.loss / self.share


@dataclass(frozen=True)
class Weights:
    """The checkpoint that is asked. `exact`: its weights are those that the step began with."""

    root: Path
    iteration: int
    exact: bool


@dataclass(frozen=True)
class AskedWeights(Weights):
    """They and the settings under which they are asked."""

    config: RunConfig


@dataclass(frozen=True)
class Replay:
    """What to look at. `samples` stand in the order of their losses, the highest first, where they have any;
    those that were left out come last."""

    step: PastStep
    store: Rows
    samples: list[PastSample]
    weights: AskedWeights | None = None  # None: the data alone

    @property
    def total(self) -> float:
        """The sum of the samples' losses."""
        return math.fsum(sample.loss for sample in self.samples if sample.loss is not None)

    @property
    def off(self) -> float | None:
        """How far that sum is from the logged loss, relatively; None: there are not both, or the weights are
        not the step's."""
        if self.weights is None or not self.weights.exact or self.step.loss is None:
            return None
        return abs(self.total - self.step.loss) / max(abs(self.step.loss), 1e-12)

    @property
    def verdict(self) -> tuple[str, bool]:
        """What the losses are worth, in a sentence, and whether they are other than the step's."""
        if self.weights is None:
            return "Data alone: no checkpoint was asked (--checkpoint).", False
        where = f"{self.weights.root}, iteration {self.weights.iteration}"
        if not self.weights.exact:
            words = f"Losses and norms under OTHER WEIGHTS than the step's ({where}); they add up to"
            return f"{words} {self.total:.6f}.", True
        words = f"The samples' losses under the weights that the step began with ({where}) add up to"
        if self.off is None:
            return f"{words} {self.total:.6f}; the logged loss is no finite number.", False
        if self.off <= LOSS_TOLERANCE[self.weights.config.training.precision]:
            return f"{words} {self.total:.6f}, the logged loss ({self.off:.0e} off).", False
        words = f"NOT the logged loss: {where}, should have the weights that the step began with, but the"
        return f"{words} samples' losses add up to {self.total:.6f} ({self.off:.0e} off).", True


def prepare(
    run: str | Path,
    iteration: int,
    *,
    checkpoint: str | Path | None = None,
    overrides: Iterable[str] = (),
    world_size: int | None = None,
) -> Replay:
    """The batch of an iteration, and the settings to compute its losses with. Needs no process group.

    Args:
        run: a folder of checkpoints, or of logs.
        checkpoint: a folder of checkpoints (that of the iteration before is taken, if it is there, else the
            latest), or one of its iter_* folders; None: no losses.
        overrides: `a.b=c`, over the checkpoint's settings; without one, of the data section alone.
        world_size: processes; None: WORLD_SIZE.
    Raises:
        UserError: no such iteration, data that are not those it read, a checkpoint that is not there or not
            of this model, and as `load_run_config`.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1)) if world_size is None else world_size
    history, run = History(run), Path(run)
    step = history.step(iteration)
    weights = None
    if checkpoint is None:
        data = _data_alone(step, overrides)
    else:
        found = _choose_weights(run, Path(checkpoint), history, step)
        weights = AskedWeights(**vars(found), config=_settings(run, found, step, overrides, world_size))
        data = weights.config.data
    loader = PackLoader(
        replace(data, decoder="exact", packs_per_sequence=1),
        global_batch_size=step.packs,
        data_parallel_rank=0,
        data_parallel_size=1,
        plan=no_tiles,
    )
    loader.close()
    _go_on(loader, step)
    changed = step.data.difference(loader.identity(step.first_pack))
    if changed is not None:
        raise UserError(
            f"{data.path}: not the data that iteration {iteration} read ({changed}); data.path=D names others"
        )
    samples = _samples(step, loader.store, loader.samples(step.first_pack))
    return Replay(step, loader.store, samples, weights)


def measure_losses(prepared: Replay) -> Replay:
    """The same with losses and gradient norms, under the checkpoint that `prepare` chose. Collective.

    Raises:
        AgreedError: as loading a checkpoint, and for media that the step read and that cannot be read
            any more.
    """
    weights = prepared.weights
    assert weights is not None, "prepare was given a checkpoint"
    config = weights.config
    with start_ranks(config) as (device, mesh):
        loader = _open(config, prepared.step, mesh, device)
        try:
            source, iteration = config.checkpoint.load, weights.iteration
            models = wrap_models(
                start_models(config, mesh, device, source, load=True, iteration=iteration),
                across_replicas=False,
            )
            losses, norms = _ask(
                prepared, config.data.sequence_length, models, mesh, loader, device.torch_device
            )
        finally:
            loader.close()
    samples = [
        sample if sample.left_out else replace(sample, loss=losses[i], grad_norm=norms[i])
        for i, sample in enumerate(prepared.samples)
    ]
    return replace(prepared, samples=sorted(samples, key=_highest_first))


def _open(config: RunConfig, step: PastStep, mesh: Mesh, device: Device) -> PackLoader[InputPlan]:
    with agreed():
        loader = PackLoader(
            config.data,
            global_batch_size=step.packs,
            data_parallel_rank=mesh.dp.rank,
            data_parallel_size=mesh.dp.size,
            plan=partial(plan_batch, config.model, mesh, device.kind == "cuda"),
            device=device.torch_device,
        )
        _go_on(loader, step)
        return loader


def _go_on(loader: PackLoader[Q], step: PastStep) -> None:
    """Let a loader that follows its data begin at the step's batch, which has to be there."""
    if step.data.shards_per_window:
        loader.go_on(step.data, step.first_pack, step.packs)
        loader.need(step.first_pack)


def _ask(
    prepared: Replay,
    length: int,
    models: Sequence[DistributedDataParallel],
    mesh: Mesh,
    loader: PackLoader[InputPlan],
    device: torch.device,
) -> tuple[list[float], list[float]]:
    """Losses and gradient norms by number of the sample."""
    step, n = prepared.step, len(prepared.samples)
    batch, failed = next_batch(loader, step.first_pack, "skip", host_group(), list(step.left_out))
    _refuse([medium for number, medium in failed.items() if number not in step.left_out])
    losses = sample_losses(models, mesh, batch.microbatches, n, length=length, device=device)
    norms: dict[int, float] = {}
    failures: dict[int, FailedMedium] = {}
    with tqdm(desc="gradients", unit=" samples", disable=torch.distributed.get_rank() != 0) as bar:
        for number, lost in backward_each(models, mesh, loader, batch, step.left_out, device):
            norms[number] = gradient_norm(models, mesh)
            failures |= lost
            bar.update()
    _refuse(list(failures.values()))
    return losses, gather_norms(norms, n, mesh, device)


def _refuse(failed: Sequence[FailedMedium]) -> None:
    """Collective."""
    problem = None
    if failed:
        problem = (
            f"{describe_failure(failed[0])}; the step could: put the file back, or leave out --checkpoint "
            "to see the data alone"
        )
    raise_together(problem)


def _highest_first(sample: PastSample) -> tuple[Any, ...]:
    if sample.loss is None:
        return 2, 0.0
    return (0, 0.0) if math.isnan(sample.loss) else (1, -sample.loss)


def _samples(step: PastStep, store: Rows, found: Sequence[tuple[int, int]]) -> list[PastSample]:
    """The batch's samples, in the order of their numbers; `found` are their packs and rows."""
    stored = [store[row] for _, row in found]
    weights = [
        0.0
        if number in step.left_out
        else sample_weight(sample, step.data.loss_weighting, step.data.multi_turn)
        for number, sample in enumerate(stored)
    ]
    total = math.fsum(weights) or 1.0
    return [
        PastSample(
            number=number,
            pack=pack,
            row=row,
            dataset=store.manifest.datasets[sample.dataset],
            file=sample.file,
            line=sample.line,
            n_tokens=sample.n_tokens,
            n_supervised=sample.n_supervised,
            share=weights[number] / total,
            left_out=step.left_out.get(number),
        )
        for number, ((pack, row), sample) in enumerate(zip(found, stored, strict=True))
    ]


def _choose_weights(run: Path, checkpoint: Path, history: History, step: PastStep) -> Weights:
    """The checkpoint to ask, and whether it is what the step began with."""
    root, iteration, before = checkpoint, None, step.iteration - 1
    if re.fullmatch(r"iter_\d+", checkpoint.name):
        root, iteration = checkpoint.parent, int(checkpoint.name.removeprefix("iter_"))
    if before == 0 and _started_from(run) == root.resolve():
        began = read_train_state(run).started_from
        same = [saved for saved in saved_iterations(root) if saved == began]
    else:  # of the run, a copy, or another run's, whose losses are others
        same = [
            saved
            for saved in saved_iterations(root)
            if history.had_weights(saved, read_train_state(root, saved).recent_losses, before)
        ]
    folder = checkpoint_folder(root, iteration if iteration is not None else next(iter(same), None))
    iteration = int(folder.name.removeprefix("iter_"))
    return Weights(root, iteration, iteration in same)


def _latest_settings(run: Path) -> dict[str, Any]:
    """Those of the run's latest checkpoint; none if it has none."""
    files = sorted(run.glob("iter_*/run.yaml"))
    return load_yaml(files[-1]) if files else {}


def _started_from(run: Path) -> Path | None:
    """The checkpoint whose weights the run began with."""
    source = (_latest_settings(run).get("checkpoint") or {}).get("load")
    return None if source is None else Path(source).resolve()


def _data_alone(step: PastStep, overrides: Iterable[str]) -> DataConfig:
    values = apply_overrides({"data": {"path": step.data.path}}, overrides)
    others = [name for name in values if name != "data"] + [
        f"data.{k}" for k in values["data"] if k != "path"
    ]
    if others:
        raise UserError(f"{others[0]}: without --checkpoint nothing but data.path can be set")
    return from_dict(DataConfig, _as_read(values["data"], step), "data")


def _as_read(data: dict[str, Any], step: PastStep) -> dict[str, Any]:
    """A data section with what decides about the batch as it was in this step."""
    then = step.data
    if not (store_folder(data["path"]) if then.shards_per_window else Path(data["path"])).is_dir():
        raise UserError(
            f"{data['path']}: the data of iteration {step.iteration} are not there; data.path=D says where"
        )
    return data | {
        "length": then.length,
        "seed": then.seed,
        "loss_weighting": then.loss_weighting,
        "multi_turn": then.multi_turn,
        "prefetch": False,
        "follow": {"shards_per_window": then.shards_per_window} if then.shards_per_window else None,
    }


def _settings(
    run: Path, weights: Weights, step: PastStep, overrides: Iterable[str], world_size: int
) -> RunConfig:
    """The run's settings, on the data of the step and with the model of the checkpoint.

    A single process takes the whole model; virtual pipeline stages change nothing and are left out. So is
    expert parallelism, and a dispatcher for it: its ranks would wait for each other, and each has samples of
    its own.
    """
    saved = load_yaml(checkpoint_folder(weights.root, weights.iteration) / "run.yaml")
    base = _latest_settings(run) or saved
    values = {**base, "model": saved.get("model"), "lora": saved.get("lora") or base.get("lora")}
    for section in ("evaluation", "logging", "resilience"):
        values.pop(section, None)
    training = {"train_iterations": step.iteration, **(base.get("training") or {})}
    training.pop("stop_at_iteration", None)
    values["training"] = training | {"global_batch_size": step.packs}
    # Nothing is saved: `path` only has to be one without a checkpoint.
    values["checkpoint"] = {"path": str(run / "replay"), "load": str(weights.root)}
    values["data"] = (base.get("data") or {}) | {"path": step.data.path}
    if world_size == 1:
        values.pop("parallel", None)
        values["data"].pop("packs_per_sequence", None)
    values = apply_overrides(values, overrides)
    values["data"] = _as_read(values["data"], step)
    if values.get("parallel"):
        for name in ("virtual_pipeline_model_parallel_size", "expert_model_parallel_size"):
            values["parallel"].pop(name, None)
    if values.get("layers"):
        values["layers"].pop("moe_token_dispatcher_type", None)
    return complete_run_config(values, world_size=world_size)
