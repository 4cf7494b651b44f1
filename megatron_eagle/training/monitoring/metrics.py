"""What steps and evaluations leave behind: one list of names for all logs, curves and the report."""

from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.files import from_record, read_records

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
NO_CURVES = ("iteration", "first_pack", "packs", "data")  # fields that say where a line belongs


@dataclass(frozen=True)
class StepMetrics:
    """A step's line of metrics.jsonl. Its names are those of the curves everywhere.

    Counts and shares are of the global batch without its padding; memory and `data_seconds` are those of the
    rank that has most.
    """

    iteration: int  # 1-based: the number of finished iterations
    loss: float  # of the global batch
    grad_norm: float  # L2 over all parameters, before clipping
    lr: float  # used by this iteration
    tokens: int  # of the global batch, padding included
    seconds: float  # wall clock, data included
    tflops: float  # model TFLOP/s of one process (model/flops.py), padding and recomputation left out
    mfu: float | None = None  # tflops / the peak (step_meter.choose_peak); none where that is not known
    # Of the routers of experts (model/experts.py), before its coefficient; not in `loss`. From
    # num_experts_per_tok, where all experts are equally busy, to num_experts. None: no router learns from it.
    aux_loss: float | None = None
    evaluation_loss: float | None = None  # only in files of before `EvaluationMetrics`
    data_seconds: float = 0.0  # of `seconds`: the wait for the batch
    mfu_vision: float | None = None  # of mfu: encoder and connector
    mfu_language: float | None = None
    packing: float | None = None  # tokens of samples / tokens
    samples: int | None = None
    frames: int | None = None  # that ADS kept
    frames_wanted: int | None = None  # that it would have kept without a token limit
    tiles: int | None = None  # of pictures and pages, as frames
    tiles_wanted: int | None = None
    device_memory_gib: float | None = None  # peak that torch allocated since the step before; none on a CPU
    host_memory_gib: float | None = None  # resident set of the process
    # Share of the samples, and of the tokens, that are in samples up to so many tokens (and above the bucket
    # before).
    samples_by_length: dict[str, float] = field(default_factory=dict)
    tokens_by_length: dict[str, float] = field(default_factory=dict)
    # Share of the packs whose keys travel so between context parallel ranks (exchange_choice.py).
    packs_by_exchange: dict[str, float] = field(default_factory=dict)
    foreign_keys: float | None = None  # share of the keys that attention reads which other ranks hold
    exposed_transfer: float | None = None  # share of attention's time that waits for keys, as estimated there
    # By data set of the mixture (monitoring/dataset_losses.py): share x loss adds up to `loss`. None where
    # the step keeps no sample of it.
    loss_by_dataset: dict[str, float | None] = field(default_factory=dict)
    share_by_dataset: dict[str, float | None] = field(default_factory=dict)  # of the loss's weight
    tokens_by_dataset: dict[str, int | None] = field(default_factory=dict)
    # Which global batch this was, for a look back (training/replay/history.py). None: by an older version.
    first_pack: int | None = None  # packs that the run had read before it
    packs: int | None = None  # of the global batch
    data: dict[str, Any] | None = None  # `data.identity.DataIdentity`

    @property
    def tokens_per_second(self) -> float:
        """Of all processes, padding included."""
        return self.tokens / self.seconds

    def scalars(self) -> dict[str, float]:
        """What has a value, by name; NAME/BUCKET for the shares by length, NAME/DATASET by data set."""
        return {"tokens_per_second": self.tokens_per_second} | _scalars(self)


@dataclass(frozen=True)
class EvaluationMetrics:
    """An evaluation's line of metrics.jsonl. It has one of its own, as it may follow a skipped step."""

    iteration: int  # after which the held-out packs were asked
    evaluation_loss: float | None  # of all of them together; None: no token of theirs has weight
    # By data set of the held-out packs, as those of a step.
    evaluation_loss_by_dataset: dict[str, float | None] = field(default_factory=dict)
    evaluation_share_by_dataset: dict[str, float | None] = field(default_factory=dict)
    evaluation_tokens_by_dataset: dict[str, int | None] = field(default_factory=dict)

    def scalars(self) -> dict[str, float]:
        """As those of a step."""
        return _scalars(self)


def _scalars(record: StepMetrics | EvaluationMetrics) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in asdict(record).items():
        if name in NO_CURVES:
            continue
        if isinstance(value, dict):
            found |= {f"{name}/{key}": part for key, part in value.items() if part is not None}
        elif value is not None:
            found[name] = value
    return found


def find_logs(run: str | Path) -> Path | None:
    """The logs in a run's folder of checkpoints, or the folder itself if it is one of logs."""
    folders = Path(run) / "logs", Path(run)
    return next((folder for folder in folders if (folder / METRICS_FILE).is_file()), None)


def read_metrics(file: str | Path) -> list[StepMetrics | EvaluationMetrics]:
    """The steps and evaluations of a metrics.jsonl, in its order (none if it does not exist).

    What a later version adds to a line is left out, and a line that is neither or was cut by a kill.
    """
    found: list[StepMetrics | EvaluationMetrics] = []
    for record in read_records(Path(file)):
        with suppress(TypeError):
            if "loss" in record:
                found.append(from_record(StepMetrics, record))
            else:
                found.append(from_record(EvaluationMetrics, record))
    return found


def read_steps(file: str | Path) -> list[StepMetrics]:
    """The steps of a metrics.jsonl; skipped ones have no line."""
    return [record for record in read_metrics(file) if isinstance(record, StepMetrics)]


def read_events(file: str | Path) -> list[dict[str, Any]]:
    """All records of an events.jsonl, as `read_metrics`."""
    return [event for event in read_records(Path(file)) if isinstance(event.get("iteration"), int)]


def plot_loss_curve(metrics_jsonl: str | Path, png: str | Path) -> None:
    """Draw loss and learning rate over the iterations.

    Raises:
        UserError: there is nothing to draw.
    """
    steps = read_steps(metrics_jsonl)
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
