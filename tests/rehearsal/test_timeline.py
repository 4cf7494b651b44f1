"""The timeline by hand: a roofline, what messages hide behind, pipelines that wait, traces, whole steps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.planning.rates import Machine
from megatron_eagle.rehearsal.messages import RECEIVE, SEND, WORLD, RankMessage, Wait
from megatron_eagle.rehearsal.timeline import (
    COMPUTE,
    KERNEL_SECONDS,
    MESSAGE_SECONDS,
    MICROBATCHES,
    PIPELINE,
    RankTimeline,
    StepRecord,
    kernel_seconds,
    message_seconds,
    timelines,
    whole_step,
)
from megatron_eagle.rehearsal.timeline_report import Prediction, write_trace
from megatron_eagle.rehearsal.work import Kernel
from megatron_eagle.runtime.gpus import GPUS

MACHINE = Machine.of(GPUS["h100"])
SECOND = Kernel("mm", MACHINE.gemm, 0)  # of one second
TP, DATA = "TENSOR_MODEL_PARALLEL_GROUP", "DATA_PARALLEL_GROUP_WITH_CP"
FAMILIES = {TP: [(0, 1), (2, 3)], PIPELINE: [(0, 2), (1, 3)], DATA: [tuple(range(16))]}
GIGABYTES = int(MACHINE.link)  # an all-gather over two ranks then takes half a second


def message(op="all_gather", group=TP, nbytes=GIGABYTES, peer=None):
    tensors = (("uint8", (nbytes,)),) * (1 if op in (SEND, RECEIVE) else 2)
    return RankMessage(group, 0, op, tensors, peer, phase=MICROBATCHES)


def record(*items, rank=0, first=0):
    """Of kernels, messages and waits in their order."""
    events, kernels = [], []
    for item in items:
        if isinstance(item, Kernel):
            kernels.append((len(events), MICROBATCHES, item))
        else:
            events.append(item)
    return StepRecord(rank, kernels, events, first, FAMILIES)


def test_a_kernel_takes_its_products_or_its_bytes():
    products = Kernel("mm", 3 * MACHINE.gemm, int(MACHINE.memory))
    assert kernel_seconds(products, MACHINE) == pytest.approx(3)
    assert kernel_seconds(replace(products, flops=0), MACHINE) == pytest.approx(1)
    assert kernel_seconds(Kernel("add", 0, 8), MACHINE) == KERNEL_SECONDS
    attention = [Kernel(f"_flash_attention_{way}", 1e15, 0) for way in ("forward", "backward")]
    assert [1e15 / kernel_seconds(kernel, MACHINE) for kernel in attention] == [370e12, 322e12]
    faster = Machine.of(GPUS["h100"], attention="flash3")
    assert kernel_seconds(attention[0], faster) < 0.6 * kernel_seconds(attention[0], MACHINE)
    assert kernel_seconds(products, faster) == kernel_seconds(products, MACHINE)


def test_a_message_takes_its_bytes_over_the_slowest_link():
    def seconds(op, group, members, peer=None, machine=MACHINE):
        return message_seconds(message(op, group, peer=peer), members, 0, machine) - MESSAGE_SECONDS

    assert seconds("all_gather", TP, (0, 1)) == pytest.approx(1 / 2)
    assert seconds("all_reduce", TP, (0, 1)) == pytest.approx(2 * 2 / 2)
    assert seconds("all_gather", TP, tuple(range(8))) == pytest.approx(7 / 8)
    apart = (0, 8)  # in two nodes: one adapter
    assert seconds("all_gather", TP, apart) == pytest.approx(MACHINE.link / MACHINE.network / 2)
    assert seconds("all_to_all", TP, (0, 1)) == pytest.approx(1 / 2)
    far = tuple(range(16))  # of which eight are in the other node; each rank's own adapter carries half
    assert seconds("all_to_all", TP, far) == pytest.approx(MACHINE.link / MACHINE.network / 2)
    assert seconds(SEND, PIPELINE, (0, 1, 2, 3), peer=2) == pytest.approx(1)
    assert message_seconds(message(), (0,), 0, MACHINE) == 0  # nobody to talk to
    barrier = RankMessage(DATA, 0, "barrier", ())
    assert message_seconds(barrier, (0, 1), 0, MACHINE) == MESSAGE_SECONDS


def test_the_world_is_all_ranks_of_its_groups():
    """It is no group that anybody makes."""
    summed = message("all_reduce", WORLD)
    (timeline,) = timelines([record(summed, Wait(0))], MACHINE)
    assert timeline.end == pytest.approx(message_seconds(summed, tuple(range(16)), 0, MACHINE))
    assert timeline.end > 1


def test_messages_hide_behind_what_does_not_wait_for_them():
    at_once = record(message(), Wait(5), SECOND, first=5)
    [waiting] = timelines([at_once], MACHINE)
    assert waiting.end == pytest.approx(1.5 + MESSAGE_SECONDS)
    assert waiting.by_kind()["waiting: tensor"] == pytest.approx(0.5 + MESSAGE_SECONDS)
    [hidden] = timelines([record(message(), SECOND, Wait(0))], MACHINE)
    assert hidden.end == pytest.approx(1) and hidden.by_kind() == {"matrix products": pytest.approx(1)}
    assert hidden.messages()["tensor"] == pytest.approx(0.5 + MESSAGE_SECONDS)
    # Two of one group follow each other, those of two groups do not; a wait for a step before is none.
    [queue] = timelines([record(message(), message(), Wait(1))], MACHINE)
    assert queue.end == pytest.approx(2 * (0.5 + MESSAGE_SECONDS))
    other = message(group=PIPELINE, op="all_gather")
    [both] = timelines([record(message(), other, Wait(0), Wait(1), Wait(-1))], MACHINE)
    assert both.end == pytest.approx(0.5 + MESSAGE_SECONDS)


def test_stages_of_a_pipeline_wait_for_each_other():
    """Stage 1 begins when stage 0 has sent, and stage 0 gets its gradient when stage 1 is done."""
    small = {"group": PIPELINE, "nbytes": 8}
    first = record(
        SECOND, message(SEND, peer=1, **small), message(RECEIVE, peer=1, **small), Wait(1), SECOND, rank=0
    )
    second = record(
        message(RECEIVE, peer=0, **small), Wait(0), SECOND, SECOND, message(SEND, peer=0, **small), rank=2
    )
    for order in ([first, second], [second, first]):
        found = {timeline.rank: timeline for timeline in timelines(order, MACHINE)}
        assert found[0].by_kind()["waiting: pipeline"] == pytest.approx(2, rel=1e-3)
        assert found[2].by_kind()["waiting: pipeline"] == pytest.approx(1, rel=1e-3)
        assert found[0].end == pytest.approx(4, rel=1e-3) and found[2].end == pytest.approx(3, rel=1e-3)
    # Without the other stage its message comes at once; with one that nobody sends the rest goes on.
    [alone] = timelines([first], MACHINE)
    assert alone.end == pytest.approx(2, rel=1e-3)
    silent = replace(second, events=[e for e in second.events if getattr(e, "op", None) != SEND])
    assert timelines([first, silent], MACHINE)[0].end == pytest.approx(2, rel=1e-3)


def test_every_second_of_the_compute_stream_has_a_kind(tmp_path: Path):
    items = [SECOND, message(), Wait(0), Kernel("add", 0, int(MACHINE.memory)), message("all_reduce", DATA)]
    ranks = timelines([record(*items, Wait(1))], MACHINE)
    assert sum(ranks[0].by_kind().values()) == pytest.approx(ranks[0].end)
    assert set(ranks[0].by_kind()) == {
        "matrix products",
        "waiting: tensor",
        "elementwise",
        "waiting: data parallel group with cp",
    }
    write_trace(ranks, tmp_path / "step.json")
    events = json.loads((tmp_path / "step.json").read_text())["traceEvents"]
    lanes = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert lanes == {COMPUTE, "tensor", "data parallel group with cp"}
    drawn = [e for e in events if e["ph"] == "X"]
    assert max(e["ts"] + e["dur"] for e in drawn) == pytest.approx(1e6 * ranks[0].end, rel=1e-6)
    compute = sorted((e for e in drawn if e["tid"] == 0), key=lambda e: e["ts"])
    for one, next_one in zip(compute, compute[1:], strict=False):  # one thing at a time
        assert one["ts"] + one["dur"] == pytest.approx(next_one["ts"])
    with pytest.raises(UserError, match="cannot write here"):
        write_trace(ranks, tmp_path / "none" / "step.json")


def test_a_whole_step_repeats_its_microbatches_and_not_its_end():
    half = record(SECOND, SECOND, message("all_gather", DATA), Wait(0))
    [rank] = timelines([half], MACHINE)
    once = rank.end - 2
    assert once > 0.5
    assert whole_step([rank], 2, 8) == pytest.approx(8 + once)
    assert whole_step([rank], 2, 2) == rank.end
    busier = RankTimeline(1, [replace(part, seconds=2.0) for part in rank.slices[:2]], 4.0)
    assert whole_step([rank, busier], 2, 8) == pytest.approx(max(rank.end, 4) + 6 * 2)
    lines = Prediction([rank], 2, 8, "a GPU").lines()
    assert lines[0] == f"predicted: a step of 8 microbatches takes {8 + once:.3g} s on a GPU"
    assert any("matrix products" in line and f"{200 / rank.end:.1f} %" in line for line in lines)
