"""flash-attn 2, 3 and 4: stand-ins with the documented signatures say whether they are called as documented.

That shows which argument is which, not that the kernels compute what we think: that takes a GPU
(`test_attention_backends.py`, `-m gpu`).
"""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_eagle.context_parallel.flash_attention import FlashAttention, FlashAttention3
from megatron_eagle.context_parallel.flash_attention4 import FlashAttention4
from megatron_eagle.context_parallel.layout import Segment
from megatron_eagle.context_parallel.reference_attention import ReferenceAttention

SEGMENTS = (Segment(0, 5, 0, 5), Segment(5, 6, 5, 6), Segment(6, 9, 6, 16))
# Of a block of a ring: the second queries see none of its keys.
BLOCK = (Segment(0, 5, 0, 5), Segment(5, 6, 5, 5), Segment(6, 9, 5, 16))
SCALE = 0.3
# Operators of FlashAttention 3 with the names and the order of its Python interface.
FWD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? qv, Tensor? out, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, "
    "Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, "
    "Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, "
    "Tensor? k_descale, Tensor? v_descale, float? softmax_scale, bool is_causal, int window_size_left, "
    "int window_size_right, int attention_chunk, float softcap, bool rotary_interleaved, "
    "Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
BWD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!) dq, "
    "Tensor(b!) dk, Tensor(c!) dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, "
    "Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, float? softmax_scale, bool is_causal, "
    "int window_size_left, int window_size_right, float softcap, bool deterministic, int sm_margin) -> Tensor"
)


def as_segments(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> tuple[Segment, ...]:
    rows, keys = cu_q.tolist(), cu_k.tolist()
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == max(cu_q.diff()) and max_k == max(cu_k.diff())
    return tuple(
        Segment(*row, *key)
        for row, key in zip(zip(rows, rows[1:], strict=False), zip(keys, keys[1:], strict=False), strict=True)
    )


def fill(grads: tuple, gradients: tuple, lse: Tensor) -> Tensor:
    for given, computed in zip(grads, gradients, strict=True):
        given.copy_(computed)
    return lse


def unseen(segments: tuple[Segment, ...]) -> list[slice]:
    return [slice(*part[:2]) for part in segments if part.k_start == part.k_end]


def kernel_forward(q, k, v, segments, scale, causal) -> tuple[Tensor, Tensor]:
    """As flash-attn's kernels, which say plus infinity of queries without keys."""
    out, lse = ReferenceAttention().forward(q, k, v, segments, scale, causal)
    for rows in unseen(segments):
        out[rows], lse[:, rows] = torch.nan, torch.inf
    return out, lse


def kernel_backward(dout, q, k, v, out, lse, segments, scale, causal) -> tuple[Tensor, Tensor, Tensor]:
    grads = ReferenceAttention().backward(dout, q, k, v, out, lse, segments, scale, causal)
    for rows in unseen(segments):
        grads[0][rows] = torch.nan
    return grads


def varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors=False,
):
    """The signature of flash-attn 2.8."""
    assert dropout_p == softcap == 0 and (window_size_left, window_size_right) == (-1, -1)
    segments = as_segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return *kernel_forward(q, k, v, segments, softmax_scale, causal), q.new_empty(0), q.new_empty(2)


def varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
    zero_tensors=False,
):
    """The signature of flash-attn 2.8."""
    assert deterministic and alibi_slopes is None and softmax_lse.is_contiguous()
    segments = as_segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    grads = kernel_backward(dout, q, k, v, out, softmax_lse, segments, softmax_scale, causal)
    return fill((dq, dk, dv), grads, softmax_lse)


def fwd(q, k, v, *others):
    names = [argument.name for argument in torch.ops.flash_attn_3.fwd.default._schema.arguments]
    given = dict(zip(names[3:], others, strict=True))
    assert given["num_splits"] == 1
    assert (given["window_size_left"], given["window_size_right"], given["softcap"]) == (-1, -1, 0)
    lengths = (
        given[f"{what}_seqlen{s}"] for what, s in [("cu", "s_q"), ("cu", "s_k"), ("max", "_q"), ("max", "_k")]
    )
    segments = as_segments(*lengths)
    out, lse = kernel_forward(q, k, v, segments, given["softmax_scale"], given["is_causal"])
    return out, lse, q.new_empty(0), q.new_empty(0)


def bwd(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_q,
    cu_k,
    used_q,
    used_k,
    max_q,
    max_k,
    scale,
    causal,
    *others,
):
    assert (used_q, used_k) == (None, None) and others == (-1, -1, 0.0, True, 0)
    assert dout.stride(-1) == 1 and softmax_lse.is_contiguous()
    segments = as_segments(cu_q, cu_k, max_q, max_k)
    grads = kernel_backward(dout, q, k, v, out, softmax_lse, segments, scale, causal)
    return fill((dq, dk, dv), grads, softmax_lse).clone()


@pytest.fixture(scope="module")
def operators():
    library = torch.library.Library("flash_attn_3", "DEF")
    for schema, function in ((FWD, fwd), (BWD, bwd)):
        library.define(schema)
        library.impl(function.__name__, function, "CPU")
    yield
    library._destroy()


@pytest.fixture
def gpu(monkeypatch):
    """A Hopper GPU, as far as the checks look."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return monkeypatch


def install(monkeypatch, name: str, **functions) -> None:
    module = ModuleType(name)
    vars(module).update(functions)
    if "." in name:
        monkeypatch.setitem(sys.modules, name.split(".")[0], ModuleType(name.split(".")[0]))
    monkeypatch.setitem(sys.modules, name, module)


def install_flash_attention(monkeypatch, **functions) -> None:
    install(monkeypatch, "flash_attn.flash_attn_interface", **functions)


def check_against_reference(backend) -> None:
    """With slices of heads, as head groups give them, and the gradient of a sum, whose strides are 0."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(9, 6, 4, generator=generator)[:, 2:4]
    k, v = (torch.randn(16, 3, 4, generator=generator)[:, 1:2] for _ in range(2))
    grad = torch.ones(()).expand(9, 2, 4)
    for segments, causal in ((SEGMENTS, True), (BLOCK, False)):
        results = []
        for each in (ReferenceAttention(), backend):
            out, lse = each.forward(q, k, v, segments, SCALE, causal)
            results.append([out, lse, *each.backward(grad, q, k, v, out, lse, segments, SCALE, causal)])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class Operator:
    """A function that is registered as a custom operator, as flash-attn's are under torch below 2.10."""

    def __init__(self, function) -> None:
        self._init_fn = function

    def __call__(self, *args, **kwargs):
        return self._init_fn(*args, **kwargs)


@pytest.mark.parametrize("kind", [lambda function: function, Operator], ids=["functions", "operators"])
def test_flash_attention_is_called_as_documented(kind, gpu, deterministic):
    names = {"_flash_attn_varlen_forward": varlen_forward, "_flash_attn_varlen_backward": varlen_backward}
    install_flash_attention(gpu, **{name: kind(function) for name, function in names.items()})
    assert FlashAttention.why_not() is None
    check_against_reference(FlashAttention())


def test_other_versions_of_flash_attention_are_refused(gpu):
    older = {"_flash_attn_varlen_backward": lambda dout, q, k, v, window_size: None}
    install_flash_attention(gpu, _flash_attn_varlen_forward=varlen_forward, **older)
    assert FlashAttention.why_not().startswith("this flash_attn's varlen backward takes no alibi_slopes, cau")
    install_flash_attention(gpu)
    assert FlashAttention.why_not() == "this flash_attn has no varlen forward of its own: 2.7 or later has"
    gpu.setitem(sys.modules, "flash_attn.flash_attn_interface", None)
    assert FlashAttention.why_not().startswith("flash_attn.flash_attn_interface does not import: ")


def test_flash_attention_3_is_called_as_documented(gpu, deterministic, operators):
    install(gpu, "flash_attn_interface")
    assert FlashAttention3.why_not() is None
    check_against_reference(FlashAttention3())


def _flash_attn_fwd(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    min_seqlen_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    softcap=None,
    window_size_left=None,
    window_size_right=None,
    num_splits=0,
    return_lse=False,
):
    """The arguments of flash-attn-4 4.0.0b36 that have to do with this."""
    assert num_splits == 1 and return_lse
    segments = as_segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return *kernel_forward(q, k, v, segments, softmax_scale, causal), None, None, None


def _flash_attn_bwd(
    q,
    k,
    v,
    out,
    dout,
    lse,
    softmax_scale=None,
    causal=False,
    softcap=0.0,
    window_size_left=None,
    window_size_right=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    deterministic=False,
    dq=None,
    dk=None,
    dv=None,
):
    """As above."""
    assert deterministic and dout.stride(-1) == 1 and lse.is_contiguous()
    segments = as_segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    grads = kernel_backward(dout, q, k, v, out, lse, segments, softmax_scale, causal)
    fill((dq, dk, dv), grads, lse)
    return dq, dk, dv


def install_flash_attention_4(monkeypatch, **functions) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn.cute", ModuleType("flash_attn.cute"))
    install(monkeypatch, "flash_attn.cute.interface", **functions)


def test_flash_attention_4_is_called_as_documented(gpu, deterministic):
    install_flash_attention_4(gpu, _flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    assert FlashAttention4.why_not() == "FlashAttention 4 is for compute capability 10.x (Blackwell)"
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert FlashAttention4.why_not() is None
    check_against_reference(FlashAttention4())


def test_other_versions_of_flash_attention_4_are_refused(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (10, 3))
    gpu.setitem(sys.modules, "flash_attn.cute.interface", None)
    assert FlashAttention4.why_not().startswith("flash_attn.cute.interface does not import: ")
    install_flash_attention_4(gpu, _flash_attn_fwd=_flash_attn_fwd)
    assert FlashAttention4.why_not() == "this flash_attn.cute has no _flash_attn_bwd"
    install_flash_attention_4(gpu, _flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=lambda q, k, v: None)
    assert FlashAttention4.why_not().startswith(
        "this flash_attn.cute's _flash_attn_bwd takes no causal, cu_seq"
    )


def test_other_versions_of_flash_attention_3_are_refused(gpu, operators):
    gpu.setitem(sys.modules, "flash_attn_interface", None)
    assert FlashAttention3.why_not().startswith("flash_attn_interface does not import: ")
    install(gpu, "flash_attn_interface")
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert FlashAttention3.why_not() == "FlashAttention 3 needs compute capability 9.x"
    gpu.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    library = torch.library.Library("flash_attn_3_other", "DEF")
    library.define("fwd(Tensor q, Tensor k, Tensor v) -> Tensor")
    gpu.setattr(torch.ops, "flash_attn_3", torch.ops.flash_attn_3_other)
    assert FlashAttention3.why_not() == (
        "this flash_attn_3::fwd has None for cu_seqlens_q, None for cu_seqlens_k, None for max_seqlen_q, "
        "None for max_seqlen_k, None for softmax_scale, None for is_causal, None for num_splits"
    )
    library._destroy()
