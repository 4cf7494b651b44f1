"""Where a run's metrics and events go: progress line, metrics.jsonl, events.jsonl, TensorBoard, W&B."""

import importlib.util
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tqdm import tqdm

from megatron_eagle.errors import UserError
from megatron_eagle.ranges import Range, Ranged
from megatron_eagle.training.metrics import (
    EVENTS_FILE,
    METRICS_FILE,
    EvaluationMetrics,
    StepMetrics,
    read_events,
    read_metrics,
)
from megatron_eagle.training.profiler import ProfileConfig

# Goes before the names in TensorBoard and W&B, which group curves by it.
PREFIX = "train/"


@dataclass
class WandbConfig:
    """Weights & Biases. The key is read from WANDB_API_KEY or `wandb login`, never from a run's file.

    `mode: offline` writes below the run's logs; `wandb sync` sends it later. A resumed run goes on with its
    curves; iterations that it repeats keep their first values there.
    """

    project: str
    name: str | None = None
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


@dataclass
class LoggingConfig(Ranged):
    """Where and what to log. `path: null` means the folder `logs` in `checkpoint.path`."""

    path: str | None = None
    tensorboard: bool = True
    wandb: WandbConfig | None = None
    # Of one device, for the model FLOPs utilisation (MFU). null: the dense bf16 peak of the GPU's exact name
    # (runtime/gpus.py); where that is not known, on a CPU and in fp32 there is no MFU.
    peak_tflops: Annotated[float, Range(1e-3, 1e6)] | None = None
    progress: bool = True
    # A window for PyTorch's profiler; null: none.
    profile: ProfileConfig | None = None

    def check(self, world_size: int) -> None:
        """Raises `UserError` for a library that is not installed, or a rank that the run does not have."""
        last = max(self.profile.ranks) if self.profile is not None else 0
        if last >= world_size:
            raise UserError(
                f"logging.profile.ranks names rank {last}: the run has {world_size} "
                f"{'process' if world_size == 1 else 'processes'}, counted from 0"
            )
        if self.wandb is not None and importlib.util.find_spec("wandb") is None:
            raise UserError(
                "logging.wandb: wandb is not installed; `pip install wandb`, or leave this section out"
            )


class RunLog:
    """Writes metrics and events everywhere they are looked at. Entered on every rank, active on rank 0.

    A resumed run appends; lines of iterations that it is about to repeat are dropped.
    """

    def __init__(
        self, config: LoggingConfig, folder: Path, *, active: bool, iteration: int, last_iteration: int
    ) -> None:
        self._active = active
        if not active:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = [m for m in read_metrics(folder / METRICS_FILE) if m.iteration <= iteration]
            events = [e for e in read_events(folder / EVENTS_FILE) if e["iteration"] <= iteration]
            self._file = open(folder / METRICS_FILE, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
            self._events = open(folder / EVENTS_FILE, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{folder}: cannot write the logs here: {error.strerror}") from error
        for metrics in kept:
            self._file.write(json.dumps(asdict(metrics)) + "\n")
        for event in events:
            self._events.write(json.dumps(event) + "\n")
        self._board = self._wandb = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)
        if config.wandb is not None:
            self._wandb = _start_wandb(config.wandb, folder)
        self._bar = tqdm(
            total=last_iteration,
            initial=iteration,
            unit="step",
            desc="train",
            disable=not config.progress,
            mininterval=0.1 if sys.stderr.isatty() else 10,
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception) -> None:
        if self._active:
            self._bar.close()
            self._file.close()
            self._events.close()
            if self._board is not None:
                self._board.close()
            if self._wandb is not None:
                self._wandb.finish()

    def step(self, metrics: StepMetrics) -> None:
        """Report a finished iteration."""
        if not self._active:
            return
        self._record(metrics)
        self._bar.set_postfix_str(progress_line(metrics), refresh=False)
        self._bar.update(metrics.iteration - self._bar.n)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Report an evaluation, whether the step before it was skipped or not."""
        if not self._active:
            return
        self._record(metrics)
        loss = metrics.evaluation_loss
        found = "no token of the held-out packs has weight" if loss is None else f"loss {loss:.4f}"
        self.message(f"iteration {metrics.iteration}: evaluation {found}")

    def _record(self, metrics: StepMetrics | EvaluationMetrics) -> None:
        self._file.write(json.dumps(asdict(metrics)) + "\n")
        scalars = {PREFIX + name: value for name, value in metrics.scalars().items()}
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, metrics.iteration)
        if self._wandb is not None:
            self._wandb.log(scalars, step=metrics.iteration)

    def event(self, iteration: int, kind: str, reason: str, **details: Any) -> None:
        """Record what is worth knowing of an iteration, in events.jsonl and above the progress bar."""
        if self._active:
            record = {"iteration": iteration, "event": kind, "reason": reason, **details}
            self._events.write(json.dumps(record) + "\n")
            self._bar.update(iteration - self._bar.n)
            self.message(f"iteration {iteration}: {kind}: {reason}")

    def message(self, text: str) -> None:
        """A line above the progress bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)


def progress_line(metrics: StepMetrics) -> str:
    """What the progress bar shows of a step, beside the time that is left."""
    shown = [
        f"loss {metrics.loss:.4f}",
        f"grad norm {metrics.grad_norm:.3f}",
        f"lr {metrics.lr:.2e}",
        f"{metrics.tokens_per_second:,.0f} tokens/s",
        f"{metrics.seconds:.2f} s ({metrics.data_seconds:.2f} data)",
    ]
    if metrics.packing is not None:
        shown.append(f"packing {metrics.packing:.1%}")
    if metrics.mfu is not None:
        shown.append(f"MFU {metrics.mfu:.1%}")
        if metrics.mfu_vision is not None:
            shown[-1] += f" ({metrics.mfu_vision:.1%} vision)"
    memory = {"GPU": metrics.device_memory_gib, "host": metrics.host_memory_gib}
    shown += [f"{where} {gib:.1f} GiB" for where, gib in memory.items() if gib is not None]
    return ", ".join(shown)


def _start_wandb(config: WandbConfig, folder: Path):
    """The W&B run of these logs: a new one, or the one that an earlier start of this run made."""
    import wandb

    known = folder / "wandb_run.txt"
    try:
        run = wandb.init(
            project=config.project,
            name=config.name,
            entity=config.entity,
            mode=config.mode,
            dir=str(folder),
            id=known.read_text().strip() if known.exists() else None,
            resume="allow",
            settings=wandb.Settings(silent=True),
        )
    except wandb.Error as error:
        hint = "" if os.environ.get("WANDB_API_KEY") else "; set WANDB_API_KEY, or logging.wandb.mode=offline"
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"logging.wandb: {reason}{hint}") from error
    known.write_text(run.id + "\n")
    return run
