"""Does every message of a job find its other end? All ranks' sequences, played against each other.

Each communicator of a rank is a queue that works in order, as a stream of NCCL does. A collective ends when
it has come to the front on all ranks of its group; a message when both its ends have. What is issued goes
into its queue; what waits for an earlier one is not issued before that has ended. If all queues end empty, no
order of events can stop the job; otherwise the first that does not fit, or whom everyone waits for, is named.

Messages of a batch travel together on their group's communicator. Others between two ranks have a
communicator of these two, on which a send waits for the receive in front of the other end's queue.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megatron_eagle.rehearsal.messages import RECEIVE, SEND, WORLD, RankMessage, Wait

Group = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Trace:
    """What a rank issues and waits for, and all groups of the job as it has made them."""

    events: Sequence[RankMessage | Wait]
    families: Mapping[str, Sequence[tuple[int, ...]]]


@dataclass(frozen=True)
class Mismatch:
    """Why the job would stop, with the places in the code."""

    what: str
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n  ".join((self.what, *self.details))


@dataclass(eq=False)
class _Unit:
    """What goes through a queue at once: a collective, a message, or a batch of messages."""

    numbers: list[int]
    messages: list[RankMessage]
    open: int = 0  # messages without their other end


@dataclass(eq=False)
class _Rank:
    """How far a rank is."""

    number: int
    events: Sequence[_Unit | Wait]
    groups: dict[tuple[str, int], Group]
    next: int = 0
    ended: set[int] = field(default_factory=set)  # numbers of messages
    queues: dict[object, deque[_Unit]] = field(default_factory=lambda: defaultdict(deque))

    @property
    def is_done(self) -> bool:
        return self.next == len(self.events) and not any(self.queues.values())


def match_messages(traces: Mapping[int, Trace]) -> Mismatch | None:
    """Play the job of these ranks; None: everything meets its other end.

    Args:
        traces: by rank. Groups may have more members, whose traces are those of others here.
    """
    first = next(iter(traces.values()))
    for rank, trace in traces.items():
        if dict(trace.families) != dict(first.families):
            return Mismatch(
                f"rank {rank} and rank {next(iter(traces))} do not make the same groups in the same order"
            )
    return _Play(traces).run()


class _Play:
    def __init__(self, traces: Mapping[int, Trace]) -> None:
        everyone = tuple(sorted(traces))
        self._ranks = {
            number: _Rank(number, _units(trace.events), _groups(number, trace, everyone))
            for number, trace in traces.items()
        }
        # Posted ends of messages, by group, sender and receiver.
        self._sent: dict[object, deque[tuple[_Rank, _Unit, RankMessage]]] = defaultdict(deque)
        self._awaited: dict[object, deque[tuple[_Rank, _Unit, RankMessage]]] = defaultdict(deque)
        self._arrived: Counter[Group] = Counter()  # ranks whose queue has a collective in front
        self._ready = deque(self._ranks.values())
        self._wrong: Mismatch | None = None

    def run(self) -> Mismatch | None:
        while self._ready and self._wrong is None:
            self._advance(self._ready.popleft())
        if self._wrong is None and not all(rank.is_done for rank in self._ranks.values()):
            return self._stuck()
        return self._wrong

    def _advance(self, rank: _Rank) -> None:
        while rank.next < len(rank.events) and self._wrong is None:
            event = rank.events[rank.next]
            if isinstance(event, Wait):
                if event.message not in rank.ended:
                    return
            else:
                self._issue(rank, event)
            rank.next += 1

    def _issue(self, rank: _Rank, unit: _Unit) -> None:
        message = unit.messages[0]
        key = rank.groups.get((message.group, message.nth))
        assert key is not None, f"rank {rank.number} has no group {message.group}"
        queue_key = _queue(rank, key, message)
        queue = rank.queues[queue_key]
        queue.append(unit)
        if len(queue) == 1:
            self._start(rank, queue_key, key)

    def _start(self, rank: _Rank, queue_key: object, key: Group) -> None:
        """The front of a queue begins."""
        unit = rank.queues[queue_key][0]
        if unit.messages[0].op not in (SEND, RECEIVE):
            self._meet(key)
            return
        unit.open = len(unit.messages)
        for message in unit.messages:
            self._post(rank, key, unit, message)

    def _post(self, rank: _Rank, key: Group, unit: _Unit, message: RankMessage) -> None:
        peer = _peer(rank, message)
        here = rank.number
        ends = (key, here, peer) if message.op == SEND else (key, peer, here)
        own, other = (self._sent, self._awaited) if message.op == SEND else (self._awaited, self._sent)
        own[ends].append((rank, unit, message))
        if not other[ends]:
            return
        there, their_unit, their_message = other[ends].popleft()
        own[ends].popleft()
        if message.tensors != their_message.tensors:
            self._wrong = Mismatch(
                f"group {key[0]}: two ends of a message differ",
                (_said(rank, message), _said(there, their_message)),
            )
            return
        for end, its in ((rank, unit), (there, their_unit)):
            its.open -= 1
            if not its.open:
                self._end(end, its, key)

    def _meet(self, key: Group) -> None:
        """A rank has come to a collective: the last one of the group ends it for all."""
        self._arrived[key] += 1
        if self._arrived[key] < len(key[1]):
            return
        self._arrived[key] = 0
        members = [self._ranks[number] for number in key[1]]
        fronts = [rank.queues[key][0] for rank in members]
        wrong = _compare(key, members, [front.messages[0] for front in fronts])
        if wrong is not None:
            self._wrong = wrong
            return
        for rank, unit in zip(members, fronts, strict=True):
            self._end(rank, unit, key, start=False)
        for rank in members:
            if rank.queues[key]:
                self._start(rank, key, key)

    def _end(self, rank: _Rank, unit: _Unit, key: Group, *, start: bool = True) -> None:
        queue_key = _queue(rank, key, unit.messages[0])
        queue = rank.queues[queue_key]
        assert queue[0] is unit
        queue.popleft()
        rank.ended.update(unit.numbers)
        self._ready.append(rank)
        if start and queue:
            self._start(rank, queue_key, key)

    def _stuck(self) -> Mismatch:
        """Nobody can go on: who waits for whom."""
        rank = min((r for r in self._ranks.values() if not r.is_done), key=lambda r: r.next)
        message = _waits_for(rank)
        key = rank.groups[message.group, message.nth]
        others = [_peer(rank, message)] if message.op in (SEND, RECEIVE) else list(key[1])
        details = [_said(rank, message)]
        for number in others:
            other = self._ranks.get(number)
            if other is None or other is rank:
                continue
            if message.op not in (SEND, RECEIVE) and any(
                unit.messages[0].what == message.what for unit in other.queues.get(key, ())
            ):
                continue  # it is there, too
            if other.is_done:
                details.append(f"rank {number}: has ended")
                break
            details.append(_said(other, _waits_for(other)))
            break
        return Mismatch(f"nobody can go on: group {key[0]} {_ranks_in_words(key[1])}", tuple(details))


def _units(events: Sequence[RankMessage | Wait]) -> list[_Unit | Wait]:
    """Events with the messages of a batch as one."""
    units: list[_Unit | Wait] = []
    number = 0
    for event in events:
        if isinstance(event, Wait):
            units.append(event)
            continue
        last = units[-1] if units else None
        if isinstance(last, _Unit) and event.batch is not None and last.messages[0].batch == event.batch:
            last.numbers.append(number)
            last.messages.append(event)
        else:
            units.append(_Unit([number], [event]))
        number += 1
    return units


def _groups(number: int, trace: Trace, everyone: tuple[int, ...]) -> dict[tuple[str, int], Group]:
    """A rank's groups, each with its members that are played."""
    played = set(everyone)
    found: dict[tuple[str, int], Group] = {(WORLD, 0): (WORLD, everyone)}
    for description, groups in trace.families.items():
        for nth, members in enumerate(group for group in groups if number in group):
            name = description if nth == 0 else f"{description} {nth}"
            found[description, nth] = name, tuple(m for m in members if m in played)
    return found


def _peer(rank: _Rank, message: RankMessage) -> int:
    """The other end's rank of the job. In the world it is its number there, of whom not all are played."""
    assert message.peer is not None
    if message.group == WORLD:
        return message.peer
    return rank.groups[message.group, message.nth][1][message.peer]


def _queue(rank: _Rank, key: Group, message: RankMessage) -> object:
    if message.op in (SEND, RECEIVE) and message.batch is None:
        return key, frozenset((rank.number, _peer(rank, message)))
    return key


def _compare(key: Group, members: Sequence[_Rank], messages: Sequence[RankMessage]) -> Mismatch | None:
    """Whether one collective is the same on all ranks."""
    first = messages[0]
    for rank, message in zip(members, messages, strict=True):
        if first.op == message.op == "all_to_all":
            same = first.tensors[0][0] == message.tensors[0][0]
            same = same and first.tensors[0][1][1:] == message.tensors[0][1][1:]
        else:
            same = first.what == message.what
        if not same:
            return Mismatch(
                f"group {key[0]} {_ranks_in_words(key[1])}: its ranks do not do the same",
                (_said(members[0], first), _said(rank, message)),
            )
    if first.op == "all_to_all":
        for i, receiver in enumerate(messages):
            for j, sender in enumerate(messages):
                if _rows(receiver, 0, j, len(members)) != _rows(sender, 1, i, len(members)):
                    return Mismatch(
                        f"group {key[0]} {_ranks_in_words(key[1])}: rank {members[i].number} awaits "
                        f"other rows than rank {members[j].number} sends it",
                        (_said(members[i], receiver), _said(members[j], sender)),
                    )
    return None


def _rows(message: RankMessage, way: int, other: int, size: int) -> int:
    """Rows that a rank of the group receives from (way 0) or sends to (1) number `other`."""
    assert message.splits is not None
    splits = message.splits[way]
    return splits[other] if splits else message.tensors[way][1][0] // size


def _waits_for(rank: _Rank) -> RankMessage:
    """The message that a rank waits for, or the first that has not ended."""
    messages = [message for event in rank.events if isinstance(event, _Unit) for message in event.messages]
    if rank.next < len(rank.events):
        event = rank.events[rank.next]
        if isinstance(event, Wait):
            return messages[event.message]
    return next(unit.messages[0] for queue in rank.queues.values() for unit in queue)


def _said(rank: _Rank, message: RankMessage) -> str:
    return f"rank {rank.number}: {message} at {message.place}"


def _ranks_in_words(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"(ranks {shown}{', ...' if len(ranks) > 8 else ''})"
