"""When everything of a rehearsed step would run: kernels by a roofline, messages beside them, pipelines.

Each rank computes on one stream. A kernel takes its FLOPs at the rate of its kind or its bytes at the
memory's, whichever is longer. A message begins when it is issued and those before it in its group have
ended; what waits for it, waits. Ranks of a pipeline meet at their messages; all other groups are taken to
arrive together, for their ranks do the same. Copies from and to the host take no time.

A prediction: rates are those of `planning/rates.py`, hosts are never slow, clocks never differ.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_eagle.planning.rates import Machine
from megatron_eagle.rehearsal.messages import RECEIVE, SEND, WORLD, RankMessage, Wait
from megatron_eagle.rehearsal.work import Kernel

KERNEL_SECONDS = 4e-6  # the shortest kernel, with its launch; assumed
MESSAGE_SECONDS = 20e-6  # before the first byte of a message has arrived; assumed
PIPELINE = "PIPELINE_MODEL_PARALLEL_GROUP"  # Megatron's description
COMPUTE = "compute"
MICROBATCHES = "forward and backward"  # the phase of microbatches

_PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "convolution", "convolution_backward"}
_BACKWARDS = {"_flash_attention_backward", "_scaled_dot_product_flash_attention_backward"}
_ATTENTION = {"_flash_attention_forward", "_scaled_dot_product_flash_attention", *_BACKWARDS}


@dataclass(frozen=True)
class StepRecord:
    """What a rank did in one step, in its order: kernels, messages, and what it waited for."""

    rank: int
    kernels: Sequence[tuple[int, str, Kernel]]  # events before it, phase
    events: Sequence[RankMessage | Wait]
    first_message: int  # number of the first of `events` among the rank's messages
    families: Mapping[str, Sequence[tuple[int, ...]]]  # groups of the job, by description


@dataclass(frozen=True)
class Slice:
    """Something with a beginning and a duration in seconds, on a lane of a rank."""

    lane: str
    name: str
    kind: str  # what the table sums up
    start: float
    seconds: float
    phase: str


@dataclass
class RankTimeline:
    """A rank's step."""

    rank: int
    slices: list[Slice] = field(default_factory=list)
    end: float = 0.0

    def by_kind(self) -> Counter[str]:
        """Seconds of the compute stream, waiting among them; they add up to the step."""
        sums: Counter[str] = Counter()
        for part in self.slices:
            if part.lane == COMPUTE:
                sums[part.kind] += part.seconds  # type: ignore[assignment]  # of seconds
        return sums

    def messages(self) -> Counter[str]:
        """Seconds in which messages travel, by group, hidden or not."""
        sums: Counter[str] = Counter()
        for part in self.slices:
            if part.lane != COMPUTE:
                sums[part.lane] += part.seconds  # type: ignore[assignment]  # of seconds
        return sums


def timelines(records: Sequence[StepRecord], machine: Machine) -> list[RankTimeline]:
    """Of ranks that are rehearsed, those of a pipeline together.

    Where another stage of a pipeline is not among them, its messages are taken to come at once.
    """
    ranks = {record.rank: _Rank(record, machine) for record in records}
    for rank in ranks.values():
        rank.meets(ranks)
    running = list(ranks.values())
    while running:
        before = [rank.progress for rank in running]
        for rank in running:
            rank.run()
        if before == [rank.progress for rank in running]:
            for rank in running:  # none can go on: a message that nobody sends, which matching would name
                rank.alone = True
        running = [rank for rank in running if not rank.done]
    return [rank.timeline for rank in ranks.values()]


def whole_step(timelines: Sequence[RankTimeline], rehearsed: int, microbatches: int) -> float:
    """Seconds of a step of so many microbatches, of which `rehearsed` are in the timelines.

    The others take what the busiest rank needs for one: pipelines are full by then, and gradients wait for
    the last.
    """
    once = "waiting: data parallel", "waiting: pipeline"
    busy = max(
        sum(
            part.seconds
            for part in timeline.slices
            if part.lane == COMPUTE and part.phase == MICROBATCHES and not part.kind.startswith(once)
        )
        for timeline in timelines
    )
    return max(timeline.end for timeline in timelines) + busy / rehearsed * (microbatches - rehearsed)


def kernel_seconds(kernel: Kernel, machine: Machine) -> float:
    """By the roofline."""
    rate = machine.gemm
    if kernel.name in _ATTENTION:
        rate = machine.attention_backward if kernel.name in _BACKWARDS else machine.attention
    return max(kernel.flops / rate, kernel.nbytes / machine.memory, KERNEL_SECONDS)


def kernel_kind(kernel: Kernel, phase: str) -> str:
    """Its row in the table of where a step goes."""
    if phase == "optimizer":
        return "optimizer"
    if kernel.name in _PRODUCTS:
        return "matrix products"
    return "attention" if kernel.name in _ATTENTION else "elementwise"


def message_seconds(message: RankMessage, members: Sequence[int], rank: int, machine: Machine) -> float:
    """Alone on its links, as a ring; a message between two at the speed of the way between them, an
    all-to-all at that of each rank's own links."""
    size = len(members)
    if size < 2:
        return 0.0
    if not message.tensors:  # an object's few bytes, or a barrier
        return MESSAGE_SECONDS
    if message.op in (SEND, RECEIVE) and message.peer is not None:
        members = sorted({members[message.peer], rank})
        return MESSAGE_SECONDS + message.nbytes / machine.ring(members)
    if message.op == "all_to_all":
        return MESSAGE_SECONDS + machine.exchange_seconds(message.nbytes, size, members[1] - members[0])
    passes = 2 if message.op.startswith("all_reduce") else 1
    share = 1.0 if message.op == "broadcast" else (size - 1) / size
    return MESSAGE_SECONDS + passes * share * message.nbytes / machine.ring(members)


class _Rank:
    """One rank on its way through its step."""

    def __init__(self, record: StepRecord, machine: Machine) -> None:
        self.record, self.machine, self.alone = record, machine, False
        self.timeline = RankTimeline(record.rank)
        self.progress = 0
        self._now = 0.0
        self._items = list(_in_order(record))
        self._lanes: dict[str, float] = defaultdict(float)
        self._ends: dict[int, float] = {}  # of messages, by number
        self._messages: dict[int, tuple[RankMessage, float]] = {}  # when each was begun
        self._awaited: dict[int, tuple[int, int]] = {}  # of a stage that is rehearsed, its so-many-th
        members = (member for groups in record.families.values() for group in groups for member in group)
        self._world = 1 + max(members, default=record.rank)
        self._groups = {name: _own(groups, record.rank) for name, groups in record.families.items()}
        self._sent: dict[int, list[float]] = defaultdict(list)  # ends of what went to a rank, in order
        self._received: Counter[int] = Counter()
        self._others: Mapping[int, _Rank] = {}
        self._number = record.first_message

    def meets(self, others: "Mapping[int, _Rank]") -> None:
        """The ranks that are rehearsed beside it."""
        self._others = others

    @property
    def done(self) -> bool:
        """Whether its step is over."""
        return self.progress == len(self._items)

    def run(self) -> None:
        """As far as it can go without the others."""
        while not self.done:
            if not self._step(self._items[self.progress]):
                return
            self.progress += 1
        self.timeline.end = max([self._now, *self._ends.values()])

    def _step(self, item: "tuple[str, Kernel] | RankMessage | Wait") -> bool:
        if isinstance(item, Wait):
            return self._wait(item)
        if isinstance(item, RankMessage):
            self._issue(item)
        else:
            self._compute(item[1], item[0])
        return True

    def _compute(self, kernel: Kernel, phase: str) -> None:
        seconds = kernel_seconds(kernel, self.machine)
        kind = kernel_kind(kernel, phase)
        self.timeline.slices.append(Slice(COMPUTE, kernel.name, kind, self._now, seconds, phase))
        self._now += seconds

    def _issue(self, message: RankMessage) -> None:
        members, lane = self._members(message), _lane(message)
        start = max(self._now, self._lanes[lane])
        end = start + message_seconds(message, members, self.record.rank, self.machine)
        number, self._number = self._number, self._number + 1
        self._messages[number] = message, start
        if message.group == PIPELINE and message.peer is not None:
            peer = members[message.peer]
            if message.op == SEND:
                self._sent[peer].append(end)
            elif peer in self._others:
                # It ends when the other stage has sent as many; seen when somebody waits for it.
                self._awaited[number] = peer, self._received[peer]
                self._received[peer] += 1
        self._ends[number] = self._lanes[lane] = end
        if number not in self._awaited:
            self._draw(number)

    def _wait(self, wait: Wait) -> bool:
        number = wait.message
        if number not in self._messages:
            return True  # of a step before
        if number in self._awaited:
            peer, place = self._awaited[number]
            came = self._others[peer]._sent[self.record.rank]
            if place < len(came):
                self._ends[number] = max(self._ends[number], came[place])
            elif not self.alone:
                return False
            del self._awaited[number]
            self._draw(number)
        message, end = self._messages[number][0], self._ends[number]
        if end > self._now:
            kind = f"waiting: {_short(message.group)}"
            self.timeline.slices.append(Slice(COMPUTE, kind, kind, self._now, end - self._now, message.phase))
            self._now = end
        return True

    def _draw(self, number: int) -> None:
        message, start = self._messages[number]
        lane, seconds = _lane(message), self._ends[number] - start
        if seconds > 0:
            name = f"{message.op} {message.nbytes / 1e6:.1f} MB"
            self.timeline.slices.append(Slice(lane, name, lane, start, seconds, message.phase))

    def _members(self, message: RankMessage) -> tuple[int, ...]:
        if message.group == WORLD:
            return tuple(range(self._world))
        groups = self._groups.get(message.group, [])
        return groups[message.nth] if message.nth < len(groups) else ()


def _in_order(record: StepRecord) -> "Iterator[tuple[str, Kernel] | RankMessage | Wait]":
    place = 0
    for before, phase, kernel in record.kernels:
        yield from record.events[place:before]
        place = max(place, before)
        yield phase, kernel
    yield from record.events[place:]


def _own(groups: Sequence[tuple[int, ...]], rank: int) -> list[tuple[int, ...]]:
    return [group for group in groups if rank in group]


def _short(group: str) -> str:
    """Megatron's description of a group in a few words."""
    return group.removesuffix("_GROUP").lower().replace("_", " ").replace(" model parallel", "")


def _lane(message: RankMessage) -> str:
    """Messages of one group follow each other; those of a pipeline's two ways do not."""
    way = f" {message.op}" if message.op in (SEND, RECEIVE) else ""
    return f"{_short(message.group)}{way}"
