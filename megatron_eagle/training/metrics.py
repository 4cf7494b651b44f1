"""What people look at while a run goes on: progress line, metrics.jsonl, TensorBoard, loss curve."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_eagle.errors import UserError

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"


@dataclass
class LoggingConfig:
    """Where and what to log. `path: null` means the folder `logs` in `checkpoint.path`."""

    path: str | None = None
    tensorboard: bool = True
    # Of one device, for the model FLOPs utilisation (MFU): 989 is the H100's and H200's in dense bf16, by the
    # data sheet. null leaves MFU out, as on a CPU.
    peak_tflops: float | None = 989.0 if torch.cuda.is_available() else None
    progress: bool = True


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl."""

    iteration: int  # 1-based: the number of finished iterations
    loss: float  # of the global batch
    grad_norm: float  # L2 over all parameters, before clipping
    lr: float  # used by this iteration
    tokens: int  # of the global batch, padding included
    seconds: float  # wall clock, data included
    tflops: float  # model TFLOP/s of one process (training/flops.py), padding and recomputation left out
    mfu: float | None = None  # tflops / logging.peak_tflops
    evaluation_loss: float | None = None  # on the held-out packs after this iteration, where it was due
    data_seconds: float = 0.0  # of `seconds`: the wait for the batch, on the rank that waited longest


class RunLog:
    """Writes each step's metrics everywhere they are looked at. Entered on every rank, active on rank 0.

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
        self._board = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=iteration + 1)
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

    def step(self, metrics: StepMetrics) -> None:
        """Report a finished iteration."""
        if not self._active:
            return
        rate = metrics.tokens / metrics.seconds
        self._file.write(json.dumps(asdict(metrics)) + "\n")
        if self._board is not None:
            for name in ("loss", "grad_norm", "lr", "seconds"):
                self._board.add_scalar(f"train/{name}", getattr(metrics, name), metrics.iteration)
            self._board.add_scalar("train/tokens_per_second", rate, metrics.iteration)
            self._board.add_scalar("train/tflops", metrics.tflops, metrics.iteration)
            if metrics.mfu is not None:
                self._board.add_scalar("train/mfu", metrics.mfu, metrics.iteration)
            if metrics.evaluation_loss is not None:
                self._board.add_scalar("evaluation/loss", metrics.evaluation_loss, metrics.iteration)
        mfu = "" if metrics.mfu is None else f", MFU {metrics.mfu:.1%}"
        self._bar.set_postfix_str(
            f"loss {metrics.loss:.4f}, grad norm {metrics.grad_norm:.3f}, lr {metrics.lr:.2e}, "
            f"{rate:,.0f} tokens/s, {metrics.seconds:.2f} s{mfu}",
            refresh=False,
        )
        self._bar.update()
        if metrics.evaluation_loss is not None:
            self.message(f"iteration {metrics.iteration}: evaluation loss {metrics.evaluation_loss:.4f}")

    def event(self, iteration: int, kind: str, reason: str, **details: int) -> None:
        """Record what is no finished step, in events.jsonl and above the progress bar."""
        if self._active:
            record = {"iteration": iteration, "event": kind, "reason": reason, **details}
            self._events.write(json.dumps(record) + "\n")
            self._bar.update()
            self.message(f"iteration {iteration}: {kind}: {reason}")

    def message(self, text: str) -> None:
        """A line above the progress bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)


def read_metrics(file: str | Path) -> list[StepMetrics]:
    """All lines of a metrics.jsonl (none if it does not exist); a half-written last line is left out."""
    file = Path(file)
    if not file.exists():
        return []
    steps = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            steps.append(StepMetrics(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # the process was killed while it wrote this line
    return steps


def read_events(file: str | Path) -> list[dict]:
    """All records of an events.jsonl, as `read_metrics`."""
    file = Path(file)
    if not file.exists():
        return []
    events = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # as above
        if isinstance(record, dict) and isinstance(record.get("iteration"), int):
            events.append(record)
    return events


def plot_loss_curve(metrics_jsonl: str | Path, png: str | Path) -> None:
    """Draw loss and learning rate over the iterations. Raises `UserError` if there is nothing to draw."""
    steps = read_metrics(metrics_jsonl)
    if not steps:
        raise UserError(f"{metrics_jsonl}: no finished training step to draw")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    iterations = [m.iteration for m in steps]
    figure, loss_axis = pyplot.subplots(figsize=(8, 4.5))
    loss_axis.plot(iterations, [m.loss for m in steps], color="tab:blue")
    loss_axis.set(xlabel="iteration", ylabel="loss", title="Training loss", ylim=(0, None))
    loss_axis.grid(alpha=0.3)
    lr_axis = loss_axis.twinx()
    lr_axis.plot(iterations, [m.lr for m in steps], color="tab:gray", linestyle="--", linewidth=1)
    lr_axis.set_ylabel("learning rate (dashed)", color="tab:gray")
    figure.tight_layout()
    figure.savefig(png, dpi=120)
    pyplot.close(figure)
