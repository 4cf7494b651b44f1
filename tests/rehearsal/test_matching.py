"""Traces of a rehearsal meet each other; those into which a fault is put do not, and it is named."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_eagle.rehearsal.kinds import RankGrid
from megatron_eagle.rehearsal.matching import Mismatch, Trace, match_messages
from megatron_eagle.rehearsal.messages import RECEIVE, SEND, WORLD, RankMessage, Recorder, Wait
from megatron_eagle.rehearsal.patches import applied
from megatron_eagle.rehearsal.rehearsal import match_speakers
from megatron_eagle.runtime.parallel import ParallelConfig

Traces = dict[int, Trace]


def find(trace: Trace, op: str, group: str = "", nth: int = 0, peer: bool = False) -> int:
    """Place of the nth event of this kind."""
    places = [
        place
        for place, event in enumerate(trace.events)
        if isinstance(event, RankMessage) and event.op == op and group in event.group
        if not peer or event.batch is None
    ]
    return places[nth]


def number(trace: Trace, place: int) -> int:
    """Of the message at this place."""
    return sum(isinstance(event, RankMessage) for event in trace.events[:place])


def without(trace: Trace, place: int) -> Trace:
    """The message there is not sent, and nobody waits for it."""
    gone = number(trace, place)
    events: list[RankMessage | Wait] = []
    for at, event in enumerate(trace.events):
        if at == place or event == Wait(gone):
            continue
        if isinstance(event, Wait) and event.message > gone:
            event = Wait(event.message - 1)
        events.append(event)
    return Trace(events, trace.families)


def changed(trace: Trace, place: int, **fields: object) -> Trace:
    """With another message there."""
    events = list(trace.events)
    events[place] = replace(events[place], **fields)  # type: ignore[type-var]
    return Trace(events, trace.families)


def skipped_gather(traces: Traces) -> Traces:
    place = find(traces[1], "all_to_all", "CONTEXT", 2)
    return traces | {1: without(traces[1], place)}


def another_order(traces: Traces) -> Traces:
    trace = traces[3]
    first = find(trace, "all_reduce", "WORLD")
    second = find(trace, "all_gather_object", "WORLD", -1)
    events = list(trace.events)
    events[first], events[second] = events[second], events[first]
    return traces | {3: Trace(events, trace.families)}


def another_shape(traces: Traces) -> Traces:
    trace = traces[2]
    place = find(trace, "reduce_scatter_coalesced")
    (dtype, shape), *rest = trace.events[place].tensors  # type: ignore[union-attr]
    return traces | {2: changed(trace, place, tensors=((dtype, (shape[0] + 1, *shape[1:])), *rest))}


def another_type(traces: Traces) -> Traces:
    trace = traces[0]
    place = find(trace, "reduce_scatter_coalesced")
    tensors = trace.events[place].tensors  # type: ignore[union-attr]
    return traces | {0: changed(trace, place, tensors=tuple(("bfloat16", shape) for _, shape in tensors))}


def another_reduction(traces: Traces) -> Traces:
    """As if one rank took the largest gradient norm where the others add them."""
    trace = traces[2]
    place = find(trace, "all_reduce", "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP")
    assert trace.events[place].reduction == "SUM"  # type: ignore[union-attr]
    return traces | {2: changed(trace, place, reduction="MAX")}


def another_scaling(traces: Traces) -> Traces:
    trace = traces[3]
    place = find(trace, "reduce_scatter_coalesced")
    return traces | {3: changed(trace, place, reduction="AVG")}


def a_rank_without_pictures_skips_its_exchange(traces: Traces) -> Traces:
    trace = traces[0]
    for _ in range(2):  # forward and backward of a microbatch
        trace = without(trace, find(trace, "all_to_all", "CONTEXT"))
    return traces | {0: trace}


def other_rows(traces: Traces) -> Traces:
    trace = traces[1]
    place = find(trace, "all_to_all", "CONTEXT")
    received, sent = trace.events[place].splits  # type: ignore[union-attr,misc]
    return traces | {1: changed(trace, place, splits=((received[0] + 1, *received[1:]), sent))}


def a_receive_that_nobody_sends(traces: Traces) -> Traces:
    trace = traces[0]
    place = find(trace, SEND, "PIPELINE")
    return traces | {0: without(trace, place)}


def a_send_that_nobody_receives(traces: Traces) -> Traces:
    trace = traces[1]
    place = find(trace, RECEIVE, "ring", -1)
    return traces | {1: without(trace, place)}


def a_message_of_another_shape(traces: Traces) -> Traces:
    trace = traces[2]
    place = find(trace, RECEIVE, "PIPELINE")
    [(dtype, shape)] = trace.events[place].tensors  # type: ignore[union-attr]
    return traces | {2: changed(trace, place, tensors=((dtype, (shape[0] // 2, *shape[1:])),))}


def one_step_less(traces: Traces) -> Traces:
    trace = traces[3]
    last = find(trace, "all_reduce", "WORLD", -1)
    return traces | {3: Trace(trace.events[:last], trace.families)}


def groups_in_another_order(traces: Traces) -> Traces:
    families = dict(traces[1].families)
    families["ring"] = list(reversed(families["ring"]))
    return traces | {1: Trace(traces[1].events, families)}


FAULTS: dict[Callable[[Traces], Traces], str] = {
    skipped_gather: "CONTEXT",
    another_order: "WORLD",
    another_shape: "reduce_scatter_coalesced",
    another_type: "bfloat16",
    another_reduction: "all_reduce MAX float32",
    another_scaling: "reduce_scatter_coalesced AVG",
    a_rank_without_pictures_skips_its_exchange: "exchange_features",
    other_rows: "awaits other rows",
    a_receive_that_nobody_sends: "PIPELINE",
    a_send_that_nobody_receives: "ring",
    a_message_of_another_shape: "two ends of a message differ",
    one_step_less: "WORLD",
    groups_in_another_order: "do not make the same groups",
}


def test_nothing_is_wrong(traces: Traces) -> None:
    assert match_messages(traces) is None


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_named(fault: Callable[[Traces], Traces], traces: Traces) -> None:
    found = match_messages(fault(traces))
    assert isinstance(found, Mismatch)
    assert FAULTS[fault] in str(found)
    if fault is not groups_in_another_order:
        places = [line for line in found.details if " at megatron" in line or "has ended" in line]
        assert len(places) == 2, f"both places: {found}"


# ---- orders that no group shows by itself

FAMILIES = {"a": [(0, 1)], "b": [(0, 1)]}


def told(*events: RankMessage | Wait) -> Trace:
    return Trace(events, FAMILIES)


def gather(group: str) -> RankMessage:
    return RankMessage(group, 0, "all_gather", (("float32", (4,)), ("float32", (2,))), place="x.py:1 f")


def message(op: str, peer: int, batch: int | None = None) -> RankMessage:
    return RankMessage("a", 0, op, (("float32", (4,)),), peer, batch=batch, place="x.py:2 g")


@pytest.mark.parametrize("op", ["broadcast", "reduce", "gather_object", "broadcast_object_list"])
def test_ranks_name_different_roots(op: str) -> None:
    one, other = (told(RankMessage("a", 0, op, (), root, place="x.py:1 f"), Wait(0)) for root in (0, 1))
    assert match_messages({0: one, 1: one}) is None
    found = str(match_messages({0: one, 1: other}))
    assert "do not do the same" in found
    assert f"{op} root 0" in found and f"{op} root 1" in found


def test_two_groups_crosswise_wait_for_each_other() -> None:
    """Each group's own order is right, and both ranks wait."""
    one = told(gather("a"), Wait(0), gather("b"), Wait(1))
    other = told(gather("b"), Wait(0), gather("a"), Wait(1))
    assert match_messages({0: one, 1: one}) is None
    assert "nobody can go on" in str(match_messages({0: one, 1: other}))
    # Neither waits before both are issued: the two communicators work at the same time.
    one = told(gather("a"), gather("b"), Wait(0), Wait(1))
    other = told(gather("b"), gather("a"), Wait(0), Wait(1))
    assert match_messages({0: one, 1: other}) is None


def test_both_send_first() -> None:
    """On the communicator of two ranks a send waits for its receive; in a batch they go together."""

    def end(peer: int, batch: int | None) -> Trace:
        return told(message(SEND, peer, batch), message(RECEIVE, peer, batch), Wait(0), Wait(1))

    assert "nobody can go on" in str(match_messages({0: end(1, None), 1: end(0, None)}))
    assert match_messages({0: end(1, 1), 1: end(0, 1)}) is None
    turned = told(message(RECEIVE, 0), message(SEND, 0), Wait(0), Wait(1))
    assert match_messages({0: end(1, None), 1: turned}) is None


def test_a_thousand_ranks() -> None:
    """1,024 ranks of 128 rows and 8 columns, of which one gathers once less."""
    rows = [tuple(range(8 * n, 8 * n + 8)) for n in range(128)]
    columns = [tuple(range(n, 1024, 8)) for n in range(8)]
    families = {"a": rows, "b": columns}
    events = [e for n in range(0, 40, 2) for e in (gather("a"), Wait(n), gather("b"), Wait(n + 1))]
    traces = {rank: Trace(events, families) for rank in range(1024)}
    assert match_messages(traces) is None
    traces[777] = without(traces[777], 20)
    found = str(match_messages(traces))
    assert "rank 777" in found


def test_numbers_of_the_job_between_two_ranks() -> None:
    """Megatron's two stages talk over the world, of which one replica in four is played; tensor parallel
    ranks between the first and the last talk like the last."""
    grid = RankGrid(ParallelConfig(tensor_model_parallel_size=4, pipeline_model_parallel_size=2), 32, 1)
    assert grid.speakers() == [0, 3, 16, 19] and len(grid.kept()) == 8

    def one(op: str, peer: int) -> Trace:
        tensor = (("bfloat16", (8,)),)
        return Trace([RankMessage(WORLD, 0, op, tensor, peer), Wait(0)], {})

    traces = {rank: one(SEND, rank + 16) for rank in (0, 3)} | {
        rank: one(RECEIVE, rank - 16) for rank in (16, 19)
    }
    assert match_speakers(grid, traces) is None
    traces[19] = one(RECEIVE, 2)  # of another rank
    assert "nobody can go on" in str(match_speakers(grid, traces))


# ---- what is listened to


def test_reductions_and_roots_are_heard() -> None:
    """Of torch's own calls, in a group whose ranks are numbered otherwise than the job's."""
    recorder = Recorder()
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    try:
        with applied(recorder.patches()), recorder:
            group, x = dist.new_group([1, 3]), torch.zeros(2)
            dist.all_reduce(x)
            dist.all_reduce(x, dist.ReduceOp.MAX, group)
            dist.reduce_scatter_tensor(x[:1], x, dist.ReduceOp.AVG, group)
            dist.broadcast(x, 3, group)
            dist.reduce(x, 1, dist.ReduceOp.MIN, group)
            dist.all_gather_object([None, None], 1, group)
            dist.gather_object(1, None, 1, group)
            dist.broadcast_object_list([1], 3)
            dist.broadcast_object_list([1], group=group, group_src=1)
    finally:
        dist.destroy_process_group()
    assert [(m.op, m.reduction, m.peer) for m in recorder.messages] == [
        ("all_reduce", "SUM", None),
        ("all_reduce", "MAX", None),
        ("reduce_scatter", "AVG", None),
        ("broadcast", None, 1),
        ("reduce", "MIN", 0),
        ("all_gather_object", None, None),
        ("gather_object", None, 0),
        ("broadcast_object_list", None, 3),
        ("broadcast_object_list", None, 1),
    ]
