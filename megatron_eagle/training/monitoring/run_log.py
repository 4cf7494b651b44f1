"""Where a run's metrics and events go: progress line, metrics.jsonl, events.jsonl, TensorBoard, W&B."""

import importlib.util
import os
import sys
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from tqdm import tqdm

from megatron_eagle.errors import UserError
from megatron_eagle.files import AppendedFile, to_line, write_whole
from megatron_eagle.ranges import Range, Ranged
from megatron_eagle.training.monitoring.log_files import Point, Sink, TensorBoardFile, drop_repeated
from megatron_eagle.training.monitoring.metrics import (
    EVENTS_FILE,
    METRICS_FILE,
    EvaluationMetrics,
    StepMetrics,
)
from megatron_eagle.training.monitoring.observer import Observer
from megatron_eagle.training.monitoring.profiler import ProfileConfig

# Goes before the names in TensorBoard and W&B, which group curves by it.
PREFIX = "train/"
TENSORBOARD, WANDB = "TensorBoard", "W&B"


@dataclass
class WandbConfig:
    """Weights & Biases. The key is read from WANDB_API_KEY or `wandb login`, never from a run's file.

    `mode: offline` writes below the run's logs; `wandb sync` sends it later. A resumed run goes on with its
    curves; iterations that it repeats keep their first values there.
    """

    project: str  # the project there
    name: str | None = None  # of the run there; null: W&B makes one up
    entity: str | None = None  # whose project; null: the user's own
    mode: Literal["online", "offline"] = "online"


@dataclass
class LoggingConfig(Ranged):
    """Where and what to log. `path: null` means the folder `logs` in `checkpoint.path`."""

    path: str | None = None
    tensorboard: bool = True  # also write TensorBoard files
    wandb: WandbConfig | None = None  # also log to Weights & Biases; null: no
    # Of one device, for the model FLOPs utilisation (MFU). null: the dense bf16 peak of the GPU's exact name
    # (runtime/gpus.py); where that is not known, on a CPU and in fp32 there is no MFU.
    peak_tflops: Annotated[float, Range(1e-3, 1e6)] | None = None
    progress: bool = True  # the progress line
    # A window for PyTorch's profiler; null: none.
    profile: ProfileConfig | None = None

    def check(self, world_size: int) -> None:
        """Refuse what cannot be logged in a job of `world_size` ranks.

        Raises:
            UserError: a library is not installed, or the run does not have a rank.
        """
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


class WandbRun:
    """The W&B run of these logs: a new one, or the one that an earlier start of this run made."""

    def __init__(self, config: WandbConfig, folder: Path) -> None:
        import wandb

        file = folder / "wandb_run.txt"
        known = file.read_text().strip() if file.exists() else ""
        try:
            self._run = wandb.init(
                project=config.project,
                name=config.name,
                entity=config.entity,
                mode=config.mode,
                dir=str(folder),
                id=known or None,
                resume="allow",
                settings=wandb.Settings(silent=True),
            )
        except wandb.Error as error:
            reason, key = str(error).splitlines()[0].rstrip("."), os.environ.get("WANDB_API_KEY")
            hint = "" if key else "; set WANDB_API_KEY, or logging.wandb.mode=offline"
            raise UserError(f"logging.wandb: {reason}{hint}") from error
        if self._run.id != known:
            write_whole(file, self._run.id + "\n")

    def write(self, point: Point) -> None:
        step, scalars = point
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


class RunLog(Observer):
    """Writes metrics and events everywhere they are looked at. Open on every rank, active on rank 0.

    A resumed run appends; only lines of iterations that it is about to repeat are dropped. A disk that is
    full when the run starts is a `UserError`; later on training goes on, see `log_files.Sink`.

    Attributes:
        repeated: iterations that an earlier start has logged, and this one is about to repeat.
    """

    def __init__(
        self, config: LoggingConfig, folder: Path, *, active: bool, iteration: int, last_iteration: int
    ) -> None:
        self._config, self._folder, self._active = config, folder, active
        self._iteration, self._last, self.repeated = iteration, last_iteration, 0
        self._sinks: dict[str, Sink[Any]] = {}
        self._close = ExitStack()

    def __enter__(self) -> Self:
        if not self._active:
            return self
        with ExitStack() as opened:
            self._bar = opened.enter_context(
                tqdm(
                    total=self._last,
                    initial=self._iteration,
                    unit="step",
                    desc="train",
                    disable=not self._config.progress,
                    mininterval=0.1 if sys.stderr.isatty() else 10,
                )
            )
            try:
                self._open_sinks(opened)
            except OSError as error:
                reason = error.strerror or error
                raise UserError(
                    f"{self._folder}: cannot write the logs here: {reason}; nothing of them is lost"
                ) from error
            self._close = opened.pop_all()
        return self

    def _open_sinks(self, opened: ExitStack) -> None:
        config, folder, iteration = self._config, self._folder, self._iteration

        def add(name: str, file: AppendedFile | TensorBoardFile | WandbRun) -> None:
            opened.callback(file.close)
            self._sinks[name] = Sink(name, file.write, self.message)

        folder.mkdir(parents=True, exist_ok=True)
        for name in (METRICS_FILE, EVENTS_FILE):
            dropped = drop_repeated(folder / name, iteration)
            if dropped.unreadable:
                self.message(
                    f"warning: {folder / name}: {dropped.unreadable} lines are damaged; they are kept"
                )
            if name == METRICS_FILE:
                self.repeated = dropped.iterations
            add(name, AppendedFile(folder / name))
        if config.tensorboard:
            add(TENSORBOARD, TensorBoardFile(folder / "tensorboard", iteration + 1))
        if config.wandb is not None:
            add(WANDB, WandbRun(config.wandb, folder))

    def __exit__(self, *exception: object) -> None:
        if not self._active:
            return
        for name, sink in self._sinks.items():
            if lost := sink.flush():
                self.message(f"warning: {name} ends without the last {lost} records of this run")
        with suppress(OSError):
            self._close.close()

    def step(self, metrics: StepMetrics) -> None:
        """Report a finished iteration."""
        if not self._active:
            return
        self._record(metrics)
        self._bar.set_postfix_str(progress_line(metrics), refresh=False)
        self._advance(metrics.iteration)

    def evaluation(self, metrics: EvaluationMetrics) -> None:
        """Report an evaluation, whether the step before it was skipped or not."""
        if not self._active:
            return
        self._record(metrics)
        loss = metrics.evaluation_loss
        found = "no token of the held-out packs has weight" if loss is None else f"loss {loss:.4f}"
        self.message(f"iteration {metrics.iteration}: evaluation {found}")

    def _record(self, metrics: StepMetrics | EvaluationMetrics) -> None:
        self._sinks[METRICS_FILE].put(to_line(asdict(metrics)))
        scalars = {PREFIX + name: value for name, value in metrics.scalars().items()}
        for name in (TENSORBOARD, WANDB):
            if name in self._sinks:
                self._sinks[name].put((metrics.iteration, scalars))

    def event(self, iteration: int, kind: str, reason: str, **details: Any) -> None:
        """Record what is worth knowing of an iteration, in events.jsonl and above the progress bar."""
        if self._active:
            record = {"iteration": iteration, "event": kind, "reason": reason, **details}
            self._sinks[EVENTS_FILE].put(to_line(record))
            self._advance(iteration)
            self.message(f"iteration {iteration}: {kind}: {reason}")

    def message(self, text: str) -> None:
        """A line above the progress bar."""
        if self._active:
            with suppress(OSError):  # what the job prints may go to the full disk too
                tqdm.write(text, file=sys.stderr)

    def _advance(self, iteration: int) -> None:
        with suppress(OSError):
            self._bar.update(iteration - self._bar.n)


def progress_line(metrics: StepMetrics) -> str:
    """What the progress bar shows of a step, beside the time that is left."""
    balance = [] if metrics.aux_loss is None else [f"aux loss {metrics.aux_loss:.3f}"]
    shown = [
        f"loss {metrics.loss:.4f}",
        *balance,
        f"grad norm {metrics.grad_norm:.3f}",
        f"lr {metrics.lr:.2e}",
        f"{metrics.tokens_per_second:,.0f} tokens/s",
        f"{metrics.seconds:.2f} s ({metrics.data_seconds:.2f} data)",
    ]
    if metrics.packing is not None:
        shown.append(f"packing {metrics.packing:.1%}")
    if metrics.packs_by_exchange:
        shares = metrics.packs_by_exchange.items()
        shown.append(f"keys {' + '.join(f'{kind} {share:.0%}' for kind, share in shares)}")
        if metrics.foreign_keys is not None and metrics.exposed_transfer is not None:
            shown[-1] += f" ({metrics.foreign_keys:.0%} foreign, {metrics.exposed_transfer:.0%} exposed)"
    if metrics.mfu is not None:
        shown.append(f"MFU {metrics.mfu:.1%}")
        if metrics.mfu_vision is not None:
            shown[-1] += f" ({metrics.mfu_vision:.1%} vision)"
    memory = {"GPU": metrics.device_memory_gib, "host": metrics.host_memory_gib}
    shown += [f"{where} {gib:.1f} GiB" for where, gib in memory.items() if gib is not None]
    return ", ".join(shown)
