"""Context parallel attention against full attention: outputs, dQ, dK, dV for every layout and exchange."""

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_eagle.context_parallel.attention import context_parallel_attention
from megatron_eagle.context_parallel.balanced import PairCosts
from megatron_eagle.context_parallel.exchange import measure_traffic, plan_exchange
from megatron_eagle.context_parallel.exchange_choice import ExchangeCosts, plan_keys
from megatron_eagle.context_parallel.layout import SequenceLayout
from megatron_eagle.context_parallel.planning import LAYOUT_NAMES, plan_layout
from megatron_eagle.context_parallel.reference_attention import ReferenceAttention
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.parallel.harness import launch

LENGTH, QUERY_HEADS, KEY_HEADS, HEAD_DIM = 96, 14, 2, 8
PACKS = {
    "one document": [0, 96],
    "on chunk edges": [0, 24, 48, 72, 96],
    "off chunk edges": [0, 1, 2, 30, 71, 95, 96],
    "short documents": [*range(0, 96, 6), 96],
    "one token each": [*range(25)],  # gradients of queries and keys are 0
    "uneven length": [0, 37, 38, 88],  # eleven tokens to each of eight chunks
}
COSTS = PairCosts(token=16384, key=64, far_key=1024)
EXCHANGE_COSTS = ExchangeCosts(key=1, far_key=1, node=8, step=1, merge=1, head_groups=2, most_keys=1000)
EXCHANGES = ("gather", "ranges", "ring")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def pack_tensors(length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, of the whole pack."""
    generator = torch.Generator().manual_seed(0)
    heads = (QUERY_HEADS, KEY_HEADS, KEY_HEADS, QUERY_HEADS)
    return [torch.randn(length, n, HEAD_DIM, generator=generator).to(dtype) for n in heads]


def plan_for(name: str, size: int, bounds: list[int]) -> SequenceLayout:
    """In chunks of four tokens where they divide the ranks' shares."""
    return plan_layout(name, bounds[-1], size, bounds, None if bounds[-1] // size % 4 else 4, costs=COSTS)


def full_attention(bounds: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Output, dQ, dK, dV in fp64 of the same rounded inputs."""
    q, k, v, grad = (x.double() for x in pack_tensors(bounds[-1], dtype))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    document = torch.bucketize(torch.arange(bounds[-1]), torch.tensor(bounds[1:]), right=True)
    mask = (document[:, None] == document[None]).tril()
    out = F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in inputs), attn_mask=mask, enable_gqa=True
    )[0].transpose(0, 1)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def attend_everywhere(ulysses: int, node: int, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """On one rank: its tokens' output, dQ, dK, dV of every layout, pack and exchange; run twice."""
    size = torch.distributed.get_world_size()
    config = ParallelConfig(
        context_parallel_size=size,
        ulysses_parallel_size=ulysses,
        context_parallel_comm="auto" if node == 1 else "ring",
        ring_node_size=node,
    )
    results = {}
    with model_parallel(config) as mesh:
        ulysses_group, key_group = mesh.groups.hcp or (None, mesh.cp.group)
        for name, pack, exchange in product(LAYOUT_NAMES, PACKS, EXCHANGES if node == 1 else ["ring"]):
            bounds = PACKS[pack]
            key_layout = plan_for(name, size // ulysses, bounds)
            index = key_layout.cut_each(ulysses).token_index(mesh.cp.rank)
            _, keys = plan_keys(key_layout, mesh.cp.rank // ulysses, bounds, exchange, EXCHANGE_COSTS, node)
            *inputs, grad = (x[index] for x in pack_tensors(bounds[-1], dtype))
            runs = []
            for _ in range(2):
                leaves = [x.clone().requires_grad_() for x in inputs]
                out = context_parallel_attention(
                    *leaves, ReferenceAttention(), keys, HEAD_DIM**-0.5, key_group, ulysses_group, mesh.ring
                )
                runs.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "two runs differ"
            results[f"{name}, {pack}, {exchange}"] = runs[0]
    return results


@pytest.mark.parametrize(
    ("size", "ulysses", "node", "dtype"),
    # Ulysses over four ranks: two for each KV head, with four and three of its query heads.
    [
        pytest.param(*sizes, dtype, marks=pytest.mark.slow if dtype == "bfloat16" and sizes[0] > 2 else ())
        for sizes in ((1, 1, 1), (2, 1, 1), (4, 1, 1), (2, 2, 1), (4, 2, 1), (4, 1, 2), (8, 2, 2), (4, 4, 1))
        for dtype in ("float32", "bfloat16")
    ],
)
def test_attention_equals_full_attention(size, ulysses, node, dtype):
    dtype = getattr(torch, dtype)
    ranks = launch(attend_everywhere, size, ulysses, node, dtype)
    expected = {pack: full_attention(bounds, dtype) for pack, bounds in PACKS.items()}
    errors = {}
    for case in ranks[0]:
        name, pack, _ = case.split(", ")
        layout = plan_for(name, size // ulysses, PACKS[pack]).cut_each(ulysses)
        for what, whole, *shares in zip(
            ("out", "dq", "dk", "dv"), expected[pack], *(rank[case] for rank in ranks), strict=True
        ):
            found = torch.cat(shares)[layout.rank_major_order.argsort()].double()
            errors[f"{case}: {what}"] = ((found - whole).norm() / whole.norm().clamp(min=1)).item()
    assert {case: error for case, error in errors.items() if not error <= TOLERANCE[dtype]} == {}


@pytest.mark.parametrize("name", LAYOUT_NAMES)
@pytest.mark.parametrize("pack", PACKS)
def test_ranges_carry_what_is_needed_and_no_more(name, pack):
    """Sent and received rows agree between ranks; the needed keys are those of the segments."""
    size, bounds = 4, PACKS[pack]
    share = bounds[-1] // size
    layout = plan_for(name, size, bounds)
    traffic = measure_traffic(layout, bounds)
    kind = "ranges" if traffic.received.max() else "none"
    plans = [plan_exchange(layout, rank, bounds, kind, traffic) for rank in range(size)]
    for rank, plan in enumerate(plans):
        needed = {i for part in layout.segments(rank, bounds) for i in range(part.k_start, part.k_end)}
        assert set(traffic.needed[rank].nonzero()[0].tolist()) == needed
        assert plan.num_received == len(needed) == share + traffic.received[rank]
        assert (plan.kind == "ranges") == (plan.ranges is not None)
        if plan.ranges is not None:
            assert plan.ranges.receive_counts == tuple(other.ranges.send_counts[rank] for other in plans)
            assert sum(plan.ranges.send_counts) == share + traffic.sent[rank]
