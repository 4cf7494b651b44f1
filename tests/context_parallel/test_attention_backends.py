"""Attention backends: what is chosen and why, their signatures, and on a GPU their numbers."""

from functools import partial
from typing import get_args

import pytest
import torch

from megatron_eagle.context_parallel import reference_attention
from megatron_eagle.context_parallel.backends import (
    AUTO,
    FAST,
    LONGEST_REFERENCE,
    AttentionName,
    choose_attention,
    why_not_backend,
)
from megatron_eagle.context_parallel.layout import Segment
from megatron_eagle.context_parallel.reference_attention import ReferenceAttention, refuse_long, row_blocks
from megatron_eagle.context_parallel.torch_attention import TorchVarlenAttention
from megatron_eagle.context_parallel.varlen import varlen_shape
from megatron_eagle.errors import UserError

# Documents of one rank: whole, cut at the front, one token, two pieces of one document.
SEGMENTS = (
    Segment(0, 70, 0, 70),
    Segment(70, 100, 70, 300),
    Segment(100, 101, 300, 301),
    Segment(101, 160, 301, 901),
)
# Of a block of a ring, whose keys are seen whole or not at all.
BLOCK = (
    Segment(0, 70, 0, 70),
    Segment(70, 100, 70, 70),
    Segment(100, 160, 70, 901),
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize("name", [*FAST, "te"])
def test_without_a_gpu(name):
    choice = choose_attention("auto", torch.bfloat16, 64)
    assert isinstance(choice.backend, ReferenceAttention)
    assert (choice.name, choice.reason) == (
        "reference",
        "attention: reference (auto; there is no CUDA device)",
    )
    with pytest.raises(UserError, match=f"layers.attention {name}: there is no CUDA device; choose another"):
        choose_attention(name, torch.bfloat16, 64)


def test_this_torch_has_the_operators_that_are_called():
    assert TorchVarlenAttention.why_not() in (None, "there is no CUDA device")


def make_usable(monkeypatch, **missing: str) -> None:
    """All fast backends work here but those that are `missing`, for that reason."""
    for name, backend in FAST.items():
        monkeypatch.setattr(backend, "why_not", partial(missing.get, name))


def test_fast_backends_refuse_fp32(monkeypatch):
    make_usable(monkeypatch)
    with pytest.raises(UserError, match="flash: it computes in bf16 and the model in float32"):
        choose_attention("flash", torch.float32, 64)
    assert choose_attention("auto", torch.float32, 64).name == "reference"


def test_auto_takes_the_first_that_works_and_says_why(monkeypatch):
    lines = []
    for missing in ({}, {"flash3": "not Hopper"}, {"flash3": "not Hopper", "flash": "no module"}):
        make_usable(monkeypatch, **missing)
        lines.append(choose_attention("auto", torch.bfloat16, 64).reason)
    assert lines == [
        "attention: flash3 (auto)",
        "attention: flash (auto; flash3: not Hopper)",
        "attention: torch_varlen (auto; flash3: not Hopper; flash: no module)",
    ]
    make_usable(monkeypatch, flash3="not Hopper", flash="no module", torch_varlen="too old")
    choice = choose_attention("auto", torch.bfloat16, 64)  # cudnn only if asked for
    assert choice.reason == (
        "attention: reference (auto; flash3: not Hopper; flash: no module; torch_varlen: too old)"
    )
    assert choice.backend.longest_on_gpu == LONGEST_REFERENCE == 8192


def test_auto_says_what_flash_attention_2_costs_on_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, costs in (((9, 0), True), ((8, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        make_usable(monkeypatch, flash3="no module")
        reason = choose_attention("auto", torch.bfloat16, 64).reason
        assert ("1.5 to 2 times as long here as FlashAttention 3" in reason) == costs
        assert reason.startswith("attention: flash (auto; flash3: no module")
        make_usable(monkeypatch)
        assert choose_attention("auto", torch.bfloat16, 64).reason == "attention: flash3 (auto)"


def test_long_segments_are_refused_on_a_gpu_unless_asked_for():
    refuse_long(SEGMENTS, 8192)
    with pytest.raises(UserError, match="attention over 600 keys .* layers.attention reference"):
        refuse_long(SEGMENTS, 512)
    assert choose_attention("reference", torch.bfloat16, 64).backend.longest_on_gpu is None


def test_varlen_arguments():
    shape = varlen_shape(SEGMENTS, torch.device("cpu"))
    assert shape.cu_q.tolist() == [0, 70, 100, 101, 160] and shape.cu_k.tolist() == [0, 70, 300, 301, 901]
    assert (shape.max_q, shape.max_k) == (70, 600)
    assert shape.cu_q.dtype == torch.int32


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_cudnn_accepts_the_graph(backward, causal):
    cudnn = pytest.importorskip("cudnn", reason="no nvidia-cudnn-frontend")
    from megatron_eagle.context_parallel.cudnn_graph import describe_graph

    graph, ports = describe_graph(8, 1024, 4096, 7, 1, 128, 0.1, causal, backward, True, {})
    graph.validate()
    grads = {"do", "dq", "dk", "dv"} if backward else set()
    assert {"q", "k", "v", "o", "stats"} | grads <= ports.keys()
    assert cudnn.__version__


@pytest.fixture
def deterministic():
    """As training has it (`runtime/determinism.py`)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize(("segments", "causal"), [(SEGMENTS, True), (BLOCK, False)])
def test_equals_the_reference(name, segments, causal, deterministic):
    if missing := why_not_backend(name, torch.bfloat16, 64):
        pytest.skip(missing)
    torch.manual_seed(0)
    q, grad = (torch.randn(160, 14, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(901, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    scale, results = 128**-0.5, []
    for backend in (ReferenceAttention(), FAST[name](), FAST[name]()):
        out, lse = backend.forward(q, k, v, segments, scale, causal)
        results.append([out, lse, *backend.backward(grad, q, k, v, out, lse, segments, scale, causal)])
    expected, *runs = results
    for found, wanted in zip(runs[0], expected, strict=True):
        found, wanted = found.float(), wanted.float()
        unseen = wanted.isinf()  # queries without keys
        assert torch.equal(found[unseen], wanted[unseen])
        found, wanted = found[~unseen], wanted[~unseen]
        assert ((found - wanted).norm() / wanted.norm()).item() < 5e-3
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "two runs differ"


@pytest.mark.parametrize(("segments", "causal"), [(SEGMENTS, True), (BLOCK, False)])
def test_blocks_of_rows_compute_what_whole_segments_do(segments, causal, monkeypatch):
    torch.manual_seed(0)
    q, grad = (torch.randn(160, 6, 16) for _ in range(2))
    k, v = (torch.randn(901, 2, 16) for _ in range(2))
    results = []
    for scores in (reference_attention.BLOCK_SCORES, 5000):
        monkeypatch.setattr(reference_attention, "BLOCK_SCORES", scores)
        blocks = list(row_blocks(segments, causal))
        out, lse = ReferenceAttention().forward(q, k, v, segments, 0.25, causal)
        grads = ReferenceAttention().backward(grad, q, k, v, out, lse, segments, 0.25, causal)
        results.append([out, lse, *grads])
    assert max((b.q_end - b.q_start) * (b.k_end - b.k_start) for b in blocks) <= 5000
    assert len(blocks) > 2 * len(segments)
    for whole, found in zip(*results, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)


def test_every_backend_can_be_asked_for():
    assert set(get_args(AttentionName)) == {"auto", "reference", "te", *FAST}
    assert set(AUTO) <= FAST.keys()
