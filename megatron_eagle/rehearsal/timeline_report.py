"""A timeline as people look at it: a trace for Perfetto or chrome://tracing, and where the step goes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError
from megatron_eagle.files import write_whole
from megatron_eagle.planning.rates import Machine
from megatron_eagle.rehearsal.gpu_types import find_gpu_type
from megatron_eagle.rehearsal.rehearsal import Rehearsal
from megatron_eagle.rehearsal.timeline import COMPUTE, RankTimeline, timelines, whole_step


@dataclass(frozen=True)
class Prediction:
    """How long a rehearsed step would take."""

    timelines: list[RankTimeline]  # of the rehearsed microbatches
    rehearsed: int
    microbatches: int  # of a whole step
    gpu: str

    @property
    def seconds(self) -> float:
        """Of a whole step."""
        return whole_step(self.timelines, self.rehearsed, self.microbatches)

    def lines(self) -> list[str]:
        """Of the rank whose step is longest: its compute stream by kind, then its messages."""
        longest = max(self.timelines, key=lambda timeline: timeline.end)
        end, kinds = longest.end, longest.by_kind()
        lines = [
            f"predicted: a step of {self.microbatches} microbatches takes {self.seconds:.3g} s on {self.gpu}",
            f"where it goes, {self.rehearsed} microbatches of rank {longest.rank}, {end:.3f} s:",
        ]
        lines += [
            f"  {seconds:8.3f} s {100 * seconds / end:5.1f} %  {kind}"
            for kind, seconds in kinds.most_common()
        ]
        idle = end - sum(kinds.values())
        if idle > 1e-3 * end:
            lines.append(f"  {idle:8.3f} s {100 * idle / end:5.1f} %  messages after the last kernel")
        lines.append("messages under way:")
        for lane, seconds in longest.messages().most_common():
            lines.append(f"  {seconds:8.3f} s {100 * seconds / end:5.1f} %  {lane}")
        return lines


def predict(rehearsal: Rehearsal) -> Prediction | None:
    """Of ranks whose step was kept; None: there is none.

    Raises:
        UserError: no speed is known for the run's attention on that GPU.
    """
    plan, gpu = rehearsal.plan, find_gpu_type(rehearsal.plan.gpu).gpu
    records = [report.step for report in rehearsal.reports if report.step is not None and not report.failure]
    if not records:
        return None
    machine = Machine.of(gpu, attention=plan.config.layers.attention)
    of_step = plan.grid.microbatches(plan.config)
    return Prediction(timelines(records, machine), plan.microbatches, of_step, gpu.name)


def write_trace(ranks: Sequence[RankTimeline], path: Path) -> None:
    """The Chrome trace format: a process for each rank, a thread for each lane, microseconds.

    Raises:
        UserError: the file cannot be written.
    """
    events = [event for timeline in ranks for event in _events(timeline)]
    try:
        write_whole(path, json.dumps({"traceEvents": events}))
    except OSError as error:
        raise UserError(f"{path}: cannot write here: {error.strerror}") from error


def _events(timeline: RankTimeline) -> Iterator[dict[str, Any]]:
    rank = timeline.rank
    lanes = sorted({part.lane for part in timeline.slices}, key=lambda lane: (lane != COMPUTE, lane))
    yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank} (predicted)"}}
    for number, lane in enumerate(lanes):
        yield {"ph": "M", "pid": rank, "tid": number, "name": "thread_name", "args": {"name": lane}}
    for part in timeline.slices:
        yield {
            "ph": "X",
            "pid": rank,
            "tid": lanes.index(part.lane),
            "name": part.name,
            "cat": part.kind,
            "ts": round(1e6 * part.start, 3),
            "dur": round(1e6 * part.seconds, 3),
            "args": {"phase": part.phase},
        }
