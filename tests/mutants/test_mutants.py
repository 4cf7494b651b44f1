"""The machinery of the mutation tests: what it finds, what it changes, what it lets pass."""

import pytest
import torch
import torch.distributed as dist

from megatron_eagle.context_parallel import attention
from tests.mutants import factors, table
from tests.mutants.collectives import ALIASES, METHODS, OBJECTS, heard
from tests.mutants.mutant import Mutant
from tests.parallel.cases import ONE_PROCESS, cell, combine, run, tiny_model
from tests.parallel.harness import launch
from tests.paths import REPO

TOLERANCE = 1e-5  # max |g - ref| / max |ref| per tensor, fp32
COPIES = "megatron_eagle/context_parallel/vision_sharding.py _Exchange.backward: own / share.copies"
SCALE = "megatron_eagle/context_parallel/attention.py CoreAttention.__init__: config.kv_channels ** (-0.5)"


def factors_of(file: str) -> list[str]:
    return factors.sites((REPO / file).read_text(encoding="utf-8"), file)


@pytest.mark.parametrize(
    ("file", "factor"),
    [
        (
            "megatron_eagle/context_parallel/attention.py",
            "CoreAttention.__init__: config.kv_channels ** (-0.5)",
        ),
        ("megatron_eagle/context_parallel/vision_sharding.py", "_Exchange.backward: own / share.copies"),
        ("megatron_eagle/data/loading/batch.py", "token_weights: table[sample.answers[1:]] / total"),
        ("kernels/eagle_kernels/linear_cross_entropy.py", "_LinearCrossEntropy.backward: grad_x *= scale"),
    ],
)
def test_known_factors_are_found(file, factor):
    assert f"{file} {factor}" in factors_of(file)


def test_kernels_and_what_lies_outside_of_functions_are_left_out():
    assert not any("_kernel:" in name for name in factors_of("kernels/eagle_kernels/rms_norm.py"))
    assert factors.sites("a = 2.0 * 3\ndef f(x):\n    return x + 1", "f") == []


@pytest.mark.parametrize(
    ("expression", "dropped", "doubled"),
    [
        ("x * 3.0", 5.0, 30.0),
        ("3.0 * x", 5.0, 30.0),
        ("x / 2", 5.0, 5.0),
        ("1 / x", 1, 0.4),
        ("x ** 2", 1.0, 50.0),
        ("t * x", [1.0, 2.0], [10.0, 20.0]),
        ("x * t", [1.0, 2.0], [10.0, 20.0]),
        ("t.clone().mul_(x)", [1.0, 2.0], [10.0, 20.0]),
        ("torch.dot(t, w)", 3.0, 46.0),
        ("t.mean(0)", 3.0, 3.0),
    ],
)
def test_an_expression_is_dropped_or_doubled(expression, dropped, doubled):
    scope = {"torch": torch, "t": torch.tensor([1.0, 2.0]), "w": torch.tensor([3.0, 10.0])}
    source = f"def f(x):\n    return {expression}"
    [site] = factors.sites(source, "f")
    for how, expected in (("dropped", dropped), ("doubled", doubled)):
        changed = scope | {factors.HELPER: factors.larger}
        exec(compile(factors.changed(source, "f", site, how), "f", "exec"), changed)
        torch.testing.assert_close(torch.as_tensor(changed["f"](5.0)), torch.as_tensor(expected))


@pytest.mark.parametrize(("statement", "doubled"), [("x *= 3", 30.0), ("x /= 2", 5.0)])
def test_an_assignment_is_dropped_or_doubled(statement, doubled):
    source = f"def f(x):\n    {statement}\n    return x"
    [site] = factors.sites(source, "f")
    for how, expected in (("dropped", 5.0), ("doubled", doubled)):
        scope = {}
        exec(compile(factors.changed(source, "f", site, how), "f", "exec"), scope)
        assert scope["f"](5.0) == expected


def test_every_method_of_a_group_that_carries_data_is_known():
    """Otherwise a collective would be called and not heard."""
    others = {"abort", "barrier", "monitored_barrier", "name", "rank", "size", "shutdown", "set_timeout"}
    others |= {"boxed", "unbox", "bound_device_id", "get_group_store", "group_desc", "group_name"}
    others |= {"merge_remote_group", "split_group", "use_pg_for_symm_mem_rendezvous", "BackendType"}
    others |= {"allgather_coalesced"}  # deprecated, of lists of lists; no caller
    others |= set(dist.ProcessGroup.BackendType.__members__)
    found = {name for name in dir(dist.ProcessGroup) if not name.startswith("_")}
    assert found - others == (METHODS.keys() | ALIASES.keys()) - {"_allgather_base", "_reduce_scatter_base"}
    assert all(hasattr(dist, name) for name in OBJECTS)


def test_no_source_calls_collectives_that_are_not_heard():
    """Functional collectives go past the groups' methods."""
    for root in ("megatron_eagle", "kernels"):
        for file in (REPO / root).rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert "functional_collectives" not in text and "_c10d_functional" not in text, file


def worst_error(mutant: Mutant, layout: str) -> float:
    """Of the layout against one process, both with the mutant."""
    with mutant.in_force():
        found, expected = (
            combine(launch(run, at.world_size, at, tiny_model()), check_replicas=False)
            for at in (cell(layout), ONE_PROCESS)
        )
    return found.worst(expected)[0]


# All planted in code that the layout runs.
NOTICED = [
    ("TP2+SP, cp_tp", Mutant("collective", " in sum_encoder_gradients", "dropped", part=True)),
    ("PP2, none", Mutant("collective", " P2PCommunicator.recv_forward", "doubled", part=True)),
    ("TP2, cp_tp", Mutant("factor", COPIES, "dropped")),
    ("TP2, cp_tp", Mutant("factor", COPIES, "doubled")),
]
# The first is subtracted and added again; the second is the same in both, and left to other tests; the third
# divides by one.
NOT_NOTICED = [
    ("TP2, none", Mutant("collective", "torch.distributed.all_reduce(logits_max", "doubled", part=True)),
    ("CP2, cp", Mutant("factor", SCALE, "doubled")),
    ("CP2, cp", Mutant("factor", COPIES, "dropped")),
]


@pytest.mark.parametrize(("layout", "mutant"), NOTICED, ids=str)
def test_a_planted_mutant_is_noticed(layout, mutant):
    assert worst_error(mutant, layout) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("layout", "mutant"), [*NOT_NOTICED[:2], pytest.param(*NOT_NOTICED[2], marks=pytest.mark.slow)], ids=str
)
def test_a_mutant_without_effect_passes(layout, mutant):
    assert worst_error(mutant, layout) <= TOLERANCE


def test_the_code_is_as_it_was_afterwards():
    before = attention.CoreAttention.__init__.__code__
    with NOT_NOTICED[1][1].in_process():
        assert attention.CoreAttention.__init__.__code__ is not before
    assert attention.CoreAttention.__init__.__code__ is before


# Called from a source of training, as far as its file's name says.
MADE_UP = """
import torch.distributed as dist
def call(name, *args, **kwargs):
    return getattr(dist, name)(*args, **kwargs)
"""


def changed_results(how: str | None) -> dict:
    """On each of two ranks: what collectives of 1 + rank deliver while all of training's are `how`."""
    scope = {}
    exec(compile(MADE_UP, str(REPO / "megatron_eagle" / "made_up.py"), "exec"), scope)
    call, rank, size = scope["call"], dist.get_rank(), dist.get_world_size()
    own, results = torch.tensor([1.0 + rank]), {}
    with heard(lambda site: how):
        results["all_reduce"] = own.clone()
        call("all_reduce", results["all_reduce"])
        results["all_gather_into_tensor"] = torch.full((size,), -1.0)
        call("all_gather_into_tensor", results["all_gather_into_tensor"], own)
        results["reduce_scatter_tensor"] = torch.zeros(1)
        call("reduce_scatter_tensor", results["reduce_scatter_tensor"], torch.tensor([1.0, 10.0]) + rank)
        results["all_to_all_single"] = torch.zeros(size)
        work = call(
            "all_to_all_single", results["all_to_all_single"], torch.tensor([1.0, 10.0]) + rank, async_op=True
        )
        work.wait()
        results["broadcast"] = own.clone()
        call("broadcast", results["broadcast"], 1)
        results["recv"] = torch.full((1,), -1.0)
        call("send", own, 1) if rank == 0 else call("recv", results["recv"], 0)
        objects = [None] * size
        call("all_gather_object", objects, rank)
        results["objects"] = torch.tensor([-1 if o is None else o for o in objects])
    return {name: value.tolist() for name, value in results.items()}


EXPECTED = {  # of rank 0 and rank 1
    None: {
        "all_reduce": [[3], [3]],
        "all_gather_into_tensor": [[1, 2], [1, 2]],
        "reduce_scatter_tensor": [[3], [21]],
        "all_to_all_single": [[1, 2], [10, 11]],
        "broadcast": [[2], [2]],
        "recv": [[-1], [1]],
        "objects": [[0, 1], [0, 1]],
    },
    "dropped": {
        "all_reduce": [[1], [2]],
        "all_gather_into_tensor": [[1, 0], [0, 2]],
        "reduce_scatter_tensor": [[1], [11]],
        "all_to_all_single": [[1, 0], [0, 11]],
        "broadcast": [[1], [2]],
        "recv": [[-1], [0]],
        "objects": [[0, -1], [-1, 1]],
    },
    "doubled": {
        "all_reduce": [[6], [6]],
        "all_gather_into_tensor": [[2, 4], [2, 4]],
        "reduce_scatter_tensor": [[6], [42]],
        "all_to_all_single": [[2, 4], [20, 22]],
        "broadcast": [[4], [4]],
        "recv": [[-1], [4]],  # sent and received twice
        "objects": [[0, 1], [0, 1]],
    },
}


@pytest.mark.parametrize("how", EXPECTED)
def test_what_a_changed_collective_delivers(how):
    ranks = launch(changed_results, 2, how)
    assert {name: [rank[name] for rank in ranks] for name in ranks[0]} == EXPECTED[how]


def test_named_equivalents_exist():
    """Factors by their names; of a collective's site, the function that calls it has such a call."""
    for name in table.equivalents():
        how, site = name.split(": ", 1)
        assert how in ("dropped", "doubled"), name
        assert table.exists(site), name
