"""What a rehearsal found, in words for who will start the job."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from megatron_eagle.planning.planner import RESERVED_BYTES
from megatron_eagle.rehearsal.gpu_types import find_gpu_type
from megatron_eagle.rehearsal.messages import RankMessage
from megatron_eagle.rehearsal.packs import UnreadPacks
from megatron_eagle.rehearsal.rank import RankReport
from megatron_eagle.rehearsal.rehearsal import Rehearsal
from megatron_eagle.runtime.parallel import ParallelConfig

_MOST = 12  # lines of a kind


def render(name: str, rehearsal: Rehearsal) -> str:
    """The report of one run."""
    lines = [*_head(name, rehearsal), *problem_lines(rehearsal), *_messages(rehearsal)]
    done = [report for report in rehearsal.reports if report.failure is None]
    if done:
        lines += [*_memory(rehearsal, done), *_syncs(done), *_traffic(done), *_work(done)]
    count = rehearsal.problems
    lines.append(f"{count} problems" if count != 1 else "1 problem")
    return "\n".join(lines)


def layout_words(parallel: ParallelConfig, gpus: int) -> str:
    """Sizes above one."""
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VPP": parallel.num_model_chunks,
        "CP": parallel.context_parallel_size,
        "DP": parallel.data_parallel_size(gpus),
        "EP": parallel.expert_model_parallel_size,
    }
    return " x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one process"


def _head(name: str, rehearsal: Rehearsal) -> Iterator[str]:
    plan = rehearsal.plan
    config, gpus = plan.config, plan.grid.world_size
    of_step = plan.grid.microbatches(config)
    gpu = find_gpu_type(plan.gpu)
    yield (
        f"{name or 'run'}: {gpus} x {gpu.gpu.name} ({gpu.multiprocessors} multiprocessors: {gpu.source}), "
        f"{layout_words(config.layout, gpus)}, packs of {config.data.length:,} tokens"
    )
    ranks = ", ".join(map(str, plan.ranks))
    yield (
        f"rehearsed: {len(plan.ranks)} ranks as they are ({ranks}), {len(rehearsal.speakers)} with few "
        f"layers for their messages; {plan.microbatches} of {of_step} microbatches of the second step, and "
        "an evaluation"
    )


def problem_lines(rehearsal: Rehearsal) -> list[str]:
    """What is to be mended, with its places."""
    wrong = [] if rehearsal.mismatch is None else [f"MISMATCH: {rehearsal.mismatch}"]
    return [*_stopped(rehearsal), *_problems(rehearsal), *wrong]


def _stopped(rehearsal: Rehearsal) -> Iterator[str]:
    seen: set[str | None] = set()
    for report in rehearsal.failures:
        assert report.failure is not None
        why = report.stopped_by
        if why not in seen:
            yield "\n  ".join((f"STOPPED at rank {report.rank}: {why}", *_own_lines(report.failure)))
        seen.add(why)


def _own_lines(trace: str) -> list[str]:
    """The last lines of a traceback that are this project's or Megatron's."""
    files = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    own = [f for f in files if "/rehearsal/" not in f and ("megatron" in f or "eagle_kernels" in f)]
    return own[-4:]


def _problems(rehearsal: Rehearsal) -> Iterator[str]:
    found: Counter[tuple[str, str]] = Counter()
    for report in rehearsal.everyone:
        for what, where, count in report.problems:
            found[what, where] += count
    for (what, where), count in found.most_common():
        yield f"PROBLEM, {count} times: {what}\n  at {where}"


def _messages(rehearsal: Rehearsal) -> Iterator[str]:
    grid = rehearsal.plan.grid
    if rehearsal.mismatch is not None:
        return
    if rehearsal.speakers and not any(report.failure for report in rehearsal.speakers):
        count = sum(len(_own(report)) for report in rehearsal.speakers)
        whose = f"all {grid.world_size} ranks'"
        if rehearsal.plan.open_loader is UnreadPacks and len(grid.played) < grid.sizes.dp:
            whose = f"the {len(grid.kept())} ranks' of {len(grid.played)} of the {grid.sizes.dp} replicas"
        yield (
            f"messages: {whose} collectives and messages meet their other ends, in every order of events "
            f"({len(grid.kept())} ranks of {len(grid.played)} replicas that differ, {count} "
            "messages recorded)"
        )
    else:
        yield "messages: not matched"


def _memory(rehearsal: Rehearsal, done: list[RankReport]) -> Iterator[str]:
    most = max(done, key=lambda report: report.peak)
    gpu = find_gpu_type(rehearsal.plan.gpu).gpu
    yield f"device memory, rank {most.rank}, which has most (GB, in blocks of 512 bytes):"
    for phase, peak in most.peaks.items():
        kinds = ", ".join(
            f"{kind} {n / 1e9:.2f}" for kind, n in sorted(peak.by_kind.items(), key=lambda k: -k[1])
        )
        yield f"  {phase}: {peak.nbytes / 1e9:.2f} = {kinds}\n    at {peak.place}"
    top = max(most.peaks.values(), key=lambda peak: peak.nbytes)
    yield "  the most of its activations and workspaces:"
    for where, size in top.by_birth[:6]:
        yield f"    {size / 1e9:.2f} made at {where}"
    room = gpu.memory - RESERVED_BYTES
    if most.peak > room:
        yield (
            f"  TOO MUCH: {gpu.name} has {gpu.memory / 1e9:g} GB, of which {RESERVED_BYTES / 1e9:g} are left "
            "to CUDA, NCCL and gaps"
        )
    by_rank = ", ".join(f"{report.rank}: {report.peak / 1e9:.2f}" for report in done)
    yield f"  peaks by rank: {by_rank}"


def _syncs(done: list[RankReport]) -> Iterator[str]:
    per_step, per_microbatch = sync_counts(done)
    yield f"the host waits for the device {per_microbatch:g} times a microbatch and {per_step} times a step:"
    for (phase, inside, what, where), count in sync_places(done)[:_MOST]:
        yield f"  {count} x {what}, {phase}{', in the schedule' if inside else ''}\n    at {where}"


def sync_places(reports: Sequence[RankReport]) -> list[tuple[tuple[str, bool, str, str], int]]:
    """(phase, whether in the schedule, what, where) and how often on the rank with most; most first."""
    most: dict[tuple[str, bool, str, str], int] = {}
    for report in reports:
        for phase, inside, what, where, count in report.syncs:
            if phase != "start":
                key = phase, inside, what, where
                most[key] = max(most.get(key, 0), count)
    return sorted(most.items(), key=lambda sync: -sync[1])


def sync_counts(reports: Sequence[RankReport]) -> tuple[int, float]:
    """Host syncs of the rank with most: of a step outside the schedule, and of a microbatch in it."""
    outside, inside = [0], [0.0]
    for report in reports:
        step = [s for s in report.syncs if s[0] not in ("start", "evaluation")]
        outside.append(sum(s[4] for s in step if not s[1]))
        inside.append(sum(s[4] for s in step if s[1]) / report.microbatches)
    return max(outside), max(inside)


def _own(report: RankReport) -> list[RankMessage]:
    return [event for event in report.events if isinstance(event, RankMessage)]


def traffic(report: RankReport) -> dict[tuple[str, str], tuple[int, int]]:
    """How many messages of a rank's steps and evaluation, and their bytes, by group and operation."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for message in _own(report):
        key = message.group, message.op
        count, nbytes = found.get(key, (0, 0))
        found[key] = count + 1, nbytes + message.nbytes
    return found


def _traffic(done: list[RankReport]) -> Iterator[str]:
    """Of the rank that moves most, the last step."""
    yield "messages of the rehearsed steps, of the rank that moves most:"
    sums = {report.rank: traffic(report) for report in done}
    rank = max(sums, key=lambda number: sum(nbytes for _, nbytes in sums[number].values()))
    for (group, op), (count, nbytes) in sorted(sums[rank].items(), key=lambda found: -found[1][1])[:_MOST]:
        yield f"  {nbytes / 1e9:9.3f} GB in {count} x {op}, {group}"


def _work(done: list[RankReport]) -> Iterator[str]:
    most = max(done, key=lambda report: sum(work[3] for work in report.work))
    yield f"work of rank {most.rank}, which has most, in the step's {most.microbatches} microbatches:"
    by_name: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for phase, name, count, flops, nbytes in most.work:
        if phase not in ("start", "evaluation"):
            for place, value in enumerate((count, flops, nbytes)):
                by_name[name][place] += value
    total = [sum(values[place] for values in by_name.values()) for place in range(3)]
    yield f"  {total[1] / 1e12:.1f} TFLOP, {total[2] / 1e9:.1f} GB read and written, {total[0]} kernels"
    launches = ", ".join(f"{count} x {name}" for name, count in sorted(most.launches.items()))
    yield f"  Triton launches, with the evaluation's: {launches or 'none'}"
    for name, (count, flops, nbytes) in sorted(by_name.items(), key=lambda w: -w[1][2])[:_MOST]:
        yield f"  {flops / 1e12:9.2f} TFLOP {nbytes / 1e9:9.2f} GB  {count} x {name}"
