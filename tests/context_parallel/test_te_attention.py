"""Transformer Engine's attention: its order of tokens, what it is told and refuses; on GPUs its numbers."""

import ast
import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.extensions import transformer_engine
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_eagle.context_parallel.attention import PackedSequence
from megatron_eagle.context_parallel.layout import contiguous, zigzag_per_document
from megatron_eagle.context_parallel.padding import pad_documents
from megatron_eagle.context_parallel.reference_attention import ReferenceAttention
from megatron_eagle.context_parallel.te_attention import TransformerEngineAttention
from megatron_eagle.errors import UserError
from megatron_eagle.model.inputs import plan_input
from megatron_eagle.model.presets import preset
from megatron_eagle.planning.planner import preset_run
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel

TE = ParallelConfig(
    context_parallel_size=2, context_parallel_layout="zigzag_per_document", pad_documents=True
)


def test_the_order_of_tokens_is_the_documented_one():
    """The example in the documentation of Transformer Engine's `thd_sequence_order_to_cp_rank_order`: four
    documents over four ranks; tokens are numbered inside their documents."""
    bounds = [0, 8, 16, 24, 40]
    short, documented = [[0, 7], [1, 6], [2, 5], [3, 4]], []
    for rank, (first, second) in enumerate([(0, 14), (2, 12), (4, 10), (6, 8)]):
        documented += 3 * short[rank] + [first, first + 1, second, second + 1]
    order = zigzag_per_document(40, 4, bounds).rank_major_order
    starts = torch.tensor([0, 8, 16, 24])[torch.bucketize(order, torch.tensor(bounds[1:]), right=True)]
    assert (order - starts).tolist() == documented


@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([1, 2, 4]), st.integers(1, 200), st.data())
def test_documents_are_filled_up(size, rows, length, data):
    cuts = data.draw(st.sets(st.integers(1, length - 1), max_size=10)) if length > 1 else set()
    bounds = [0, *sorted(cuts), length]
    longer, source = pad_documents(length, bounds, 2 * size, 2 * size * rows)
    assert len(source) == longer[-1] and longer[-1] % (2 * size * rows) == 0
    assert longer[-1] - length < (len(bounds) - 1) * 2 * size + 2 * size * rows
    for start, end, first, last in zip(bounds, bounds[1:], longer, longer[1:], strict=False):
        assert (last - first) % (2 * size) == 0
        assert source[first:last].tolist() == [*range(start, end)] + [-1] * (last - first - end + start)
    # Every rank holds two equal chunks of every document, the r-th and the r-th from the end.
    layout = zigzag_per_document(longer[-1], size, longer)
    for rank in range(size):
        expected = []
        for first, last in zip(longer, longer[1:], strict=False):
            tokens = torch.arange(first, last).chunk(2 * size)
            expected += [tokens[rank], tokens[2 * size - 1 - rank]]
        assert torch.equal(layout.token_index(rank), torch.cat(expected))


def test_plan_of_a_pack():
    """Documents of 5, 1 and 8 tokens over two ranks, rows of a rank divided by two tensor parallel ranks."""
    plans = [
        plan_input(
            preset("tiny").with_data(vocab_size=512, image_token_index=7),
            SimpleNamespace(
                config=replace(TE, tensor_model_parallel_size=2, sequence_parallel=True),
                cp=SimpleNamespace(rank=rank, size=2),
                tp=SimpleNamespace(size=2),
                ranks_per_node=8,
            ),
            input_ids=torch.arange(14),
            document_bounds=[0, 5, 6, 14],
            num_tiles=None,
        )
        for rank in range(2)
    ]
    for plan in plans:
        assert plan.document_bounds.tolist() == [0, 8, 12, 24] and plan.document_bounds.dtype == torch.int32
        assert plan.longest_document == 12
    assert plans[0].token_index.tolist() == [0, 1, -1, -1, 5, -1, 6, 7, 8, -1, -1, -1]
    assert plans[1].token_index.tolist() == [2, 3, 4, -1, -1, -1, 9, 10, 11, 12, 13, -1]


class Recorded(torch.nn.Module):
    """In the place of Megatron's TEDotProductAttention."""

    def __init__(self, **arguments) -> None:
        super().__init__()
        self.built_with = arguments

    def forward(self, **arguments) -> torch.Tensor:
        self.called_with = arguments
        return arguments["query"].flatten(1)


def megatron_arguments(method: str) -> set[str]:
    """Of the installed TEDotProductAttention, which without Transformer Engine is a mock: from its source."""
    tree = ast.parse(inspect.getsource(transformer_engine))
    [cls] = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TEDotProductAttention"]
    [function] = [n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == method]
    return {argument.arg for argument in function.args.args}


def test_it_is_called_as_megatron_declares_it(monkeypatch):
    monkeypatch.setattr(transformer_engine, "TEDotProductAttention", Recorded)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4, num_query_groups=2)
    groups = object()
    core = TransformerEngineAttention(config, 3, AttnMaskType.causal, "self", pg_collection=groups)
    assert core.attention.built_with.keys() <= megatron_arguments("__init__")
    assert core.attention.built_with["cp_comm_type"] == "p2p"
    assert core.attention.built_with["pg_collection"] is groups

    lengths = torch.tensor([0, 8, 12], dtype=torch.int32)
    q, k = torch.randn(6, 1, 4, 4), torch.randn(6, 1, 2, 4)
    unread = {"position_ids": None, "layout": None, "exchange": None}
    packed = PackedSequence(cu_seqlens_q=lengths, max_seqlen_q=8, **unread)
    out = core(q, k, k, None, packed_seq_params=packed)
    assert torch.equal(out, q.reshape(6, 1, 16))
    called = core.attention.called_with
    assert called.keys() <= megatron_arguments("forward")
    assert called["query"].shape == (6, 4, 4) and called["key"].shape == (6, 2, 4)
    told = called["packed_seq_params"]
    assert told.qkv_format == "thd" and (told.max_seqlen_q, told.max_seqlen_kv) == (8, 8)
    names = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")
    assert all(getattr(told, name) is lengths for name in names)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"context_parallel_layout": "balanced", "pad_documents": False},
            "context_parallel_layout=zigzag_per",
        ),
        (
            {"pad_documents": False},
            "te divides every document .*size 2 and .*: set parallel.pad_documents=true",
        ),
        ({"context_parallel_comm": "ring"}, "its own ring: set parallel.context_parallel_comm=auto, or"),
        ({"context_parallel_size": 4, "ulysses_parallel_size": 2}, "set parallel.ulysses_parallel_size=1"),
        (
            {"context_parallel_layout": "balanced"},
            "pad_documents has no use with .* balanced: set it to false",
        ),
        ({"pipeline_model_parallel_size": 2}, "pad_documents makes packs of different lengths"),
        ({}, None),
        ({"context_parallel_size": 1, "pad_documents": False}, None),
    ],
)
def test_layouts_that_it_cannot_work_with(settings, message):
    run = preset_run("eagle2.5-8b", 32768, 64, ["layers.attention=te"])
    run = replace(run, parallel=replace(TE, **settings))
    if message is None:
        run.validate(8)
        return
    with pytest.raises(UserError, match=message):
        run.validate(8)


def compare_on_gpus(rank: int, size: int, store: str) -> None:
    """One rank: output, dQ, dK, dV against the reference on the whole pack, and the same bits twice."""
    torch.cuda.set_device(rank)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.distributed.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.manual_seed(0)
    bounds, _ = pad_documents(901, [0, 70, 71, 300, 901], 2 * size, 2 * size)
    length, heads = bounds[-1], (14, 2, 2, 14)
    q, k, v, grad = (torch.randn(length, n, 128, dtype=torch.bfloat16, device="cuda") for n in heads)
    reference, segments = ReferenceAttention(), contiguous(length, 1).segments(0, bounds)
    out, lse = reference.forward(q, k, v, segments, 128**-0.5)
    expected = [out, *reference.backward(grad, q, k, v, out, lse, segments, 128**-0.5)]
    mine = zigzag_per_document(length, size, bounds).token_index(rank).cuda()
    packed = PackedSequence(
        cu_seqlens_q=torch.tensor(bounds, dtype=torch.int32, device="cuda"),
        max_seqlen_q=bounds[-1] - bounds[-2],
        position_ids=None,
        layout=None,
        exchange=None,
    )
    config = TransformerConfig(
        num_layers=1,
        hidden_size=14 * 128,
        num_attention_heads=14,
        num_query_groups=2,
        kv_channels=128,
        attention_dropout=0.0,
        context_parallel_size=size,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    with model_parallel(replace(TE, context_parallel_size=size)) as mesh:
        core = TransformerEngineAttention(config, 1, AttnMaskType.causal, "self", pg_collection=mesh.groups)
        runs = []
        for _ in range(2):
            leaves = [x[mine].unsqueeze(1).requires_grad_() for x in (q, k, v)]
            found = core(*leaves, None, packed_seq_params=packed)
            grads = torch.autograd.grad(found, leaves, grad[mine].reshape(len(mine), 1, -1))
            runs.append([found.reshape(-1, 14, 128), *(x.squeeze(1) for x in grads)])
    for one, again, wanted in zip(*runs, expected, strict=True):
        assert torch.equal(one, again), "two runs differ"
        assert (one - wanted[mine]).float().norm() / wanted[mine].float().norm() < 5e-3
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2])
def test_equals_the_reference(size, tmp_path):
    if missing := TransformerEngineAttention.why_not():
        pytest.skip(missing)
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    torch.multiprocessing.spawn(compare_on_gpus, (size, str(tmp_path / "store")), nprocs=size)
