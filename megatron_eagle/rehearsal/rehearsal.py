"""A run rehearsed on a number of GPUs: its distinct ranks, and all ranks' messages against each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_eagle.errors import UserError
from megatron_eagle.planning.rates import Machine
from megatron_eagle.rehearsal.gpu_types import find_gpu_type
from megatron_eagle.rehearsal.kinds import RankGrid, cut_depth, rehearsed_microbatches
from megatron_eagle.rehearsal.matching import Mismatch, Trace, match_messages
from megatron_eagle.rehearsal.messages import RECEIVE, SEND, WORLD, RankMessage, Wait
from megatron_eagle.rehearsal.packs import PACK_KINDS, MadeUp
from megatron_eagle.rehearsal.rank import RankReport
from megatron_eagle.rehearsal.session import Job, run_jobs
from megatron_eagle.training.run_config import RunConfig
from megatron_eagle.training.setup import OpenLoader


@dataclass(frozen=True)
class RehearsalPlan:
    """What is to be rehearsed."""

    config: RunConfig
    gpu: str
    grid: RankGrid
    open_loader: OpenLoader
    microbatches: int  # rehearsed, of those of a step
    ranks: tuple[int, ...]  # at full depth
    timeline: bool = False  # of these

    @classmethod
    def of(
        cls,
        config: RunConfig,
        gpu: str,
        gpus: int,
        *,
        ranks: Sequence[int] | None = None,
        microbatches: int | None = None,
        open_loader: OpenLoader | None = None,
        pack_classes: int = len(PACK_KINDS),
        timeline: bool = False,
    ) -> "RehearsalPlan":
        """`ranks`: None: the distinct ones. `microbatches`: None: as many as fill the pipeline.

        Raises:
            UserError: a rank or microbatches that the job does not have, or a timeline of attention for which
                no speed is known.
        """
        grid = RankGrid(config.layout, gpus, pack_classes)
        of_step = grid.microbatches(config)
        count = microbatches or rehearsed_microbatches(config.layout, of_step)
        _check_microbatches(count, of_step, config)
        if timeline:
            Machine.of(find_gpu_type(gpu).gpu, attention=config.layers.attention)
        for rank in ranks or ():
            if not 0 <= rank < gpus:
                raise UserError(f"--ranks: there is no rank {rank}: the job has {gpus}, counted from 0")
        if ranks is None:
            # Replicas that together have every kind of pack: microbatch m of replica r has kind r + m.
            ranks = grid.distinct(grid.replicas[::count])
        open_loader = open_loader or MadeUp(config.model)
        return cls(config, gpu, grid, open_loader, count, tuple(dict.fromkeys(ranks)), timeline)


def _check_microbatches(count: int, of_step: int, config: RunConfig) -> None:
    stages = config.layout.pipeline_model_parallel_size
    if count > of_step:
        raise UserError(
            f"--microbatches is {count}: a step of this run has {of_step} on a data parallel rank"
        )
    if config.layout.num_model_chunks > 1 and count % stages:
        raise UserError(
            f"--microbatches is {count}: with virtual pipeline stages it must be a multiple of {stages} "
            "(pipeline_model_parallel_size)"
        )


@dataclass(frozen=True)
class Rehearsal:
    """What was found."""

    plan: RehearsalPlan
    reports: list[RankReport]  # of `plan.ranks`
    speakers: list[RankReport]  # with few layers, of all who say something else than others; may be none
    mismatch: Mismatch | None

    @property
    def everyone(self) -> list[RankReport]:
        """Of both kinds, each once: a model of few layers is rehearsed for both."""
        own = {id(report) for report in self.reports}
        return [*self.reports, *(report for report in self.speakers if id(report) not in own)]

    @property
    def failures(self) -> list[RankReport]:
        """Ranks that did not come to their end."""
        return [report for report in self.everyone if report.failure is not None]

    @property
    def problems(self) -> int:
        """Of all kinds together, each once: ranks that stop for the same reason have one."""
        found = {(what, where) for report in self.everyone for what, where, _ in report.problems}
        stopped = {report.stopped_by for report in self.failures}
        return len(found) + len(stopped) + (self.mismatch is not None)


def rehearse(
    plan: RehearsalPlan,
    processes: int,
    *,
    messages: bool = True,
    before: Callable[[], None] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Rehearsal:
    """Rehearse `plan`.

    Args:
        processes: at the same time.
        messages: also match the messages of all ranks, with few layers.
        before: runs in every rank's process first: for tests.
        tell: hears a line for each rank that has ended.
    """
    grid = plan.grid

    def job(config: RunConfig, rank: int, timeline: bool = False) -> Job:
        common = plan.gpu, rank, grid.world_size, plan.open_loader, plan.microbatches, before
        return Job(config, *common, timeline)

    cut = cut_depth(plan.config)
    speakers = grid.speakers() if messages else []
    jobs = [job(plan.config, rank, plan.timeline) for rank in plan.ranks]
    shallow = cut != plan.config  # a model of few layers is not rehearsed twice
    more = [rank for rank in speakers if shallow or rank not in plan.ranks]
    jobs += [job(cut, rank) for rank in more]

    def told(number: int, report: RankReport) -> None:
        how = "stopped" if report.failure else f"peak {report.peak / 1e9:.2f} GB"
        depth = ", few layers" if shallow and number >= len(plan.ranks) else ""
        tell(f"rank {report.rank}{depth}: {how}, {report.seconds:.0f} s")

    reports = run_jobs(jobs, processes, told)
    full, short = reports[: len(plan.ranks)], reports[len(plan.ranks) :]
    if not shallow:
        short += [report for report in full if report.rank in speakers]
    mismatch = None
    if short and not any(report.failure for report in short):
        traces = {report.rank: Trace(report.events, report.families) for report in short}
        mismatch = match_speakers(grid, traces)
    return Rehearsal(plan, full, short, mismatch)


def match_speakers(grid: RankGrid, traces: dict[int, Trace]) -> Mismatch | None:
    """Every rank of the replicas that are played, by the traces of those that they talk like."""
    return match_messages({rank: _trace(grid, traces, rank) for rank in grid.kept()})


def _trace(grid: RankGrid, traces: dict[int, Trace], rank: int) -> Trace:
    """What `rank` says: in the world, ranks have numbers of the job, which are others from its place."""
    like = grid.talks_like(rank)
    trace = traces[like]
    if like == rank:
        return trace
    return Trace([_moved(event, rank - like) for event in trace.events], trace.families)


def _moved(event: RankMessage | Wait, by: int) -> RankMessage | Wait:
    if isinstance(event, Wait) or event.group != WORLD or event.op not in (SEND, RECEIVE):
        return event
    assert event.peer is not None
    return replace(event, peer=event.peer + by)
