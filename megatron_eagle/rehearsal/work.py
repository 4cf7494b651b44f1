"""Work of operators by shape: multiplications and additions, and bytes of device memory read and written."""

from collections import Counter
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from megatron_eagle.rehearsal.memory import rounded

_aten = torch.ops.aten
_FLASH_FORWARD, _FLASH_BACKWARD = _aten._flash_attention_forward, _aten._flash_attention_backward
_SDPA_FORWARD = _aten._scaled_dot_product_flash_attention
_SDPA_BACKWARD = _aten._scaled_dot_product_flash_attention_backward


# Operators by what they do to memory; others read what they are given and write what they give.
_NOTHING = {
    "_unsafe_view",
    "alias",
    "detach",
    "lift_fresh",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
}
_SELECTING = {"index_select", "embedding", "gather", "index"}
_FILLING = {"zero_", "fill_", "zeros", "zeros_like", "new_zeros", "ones", "full", "arange"}


@dataclass(frozen=True)
class Kernel:
    """One operator on the device."""

    name: str
    flops: float
    nbytes: int


@dataclass
class Work:
    """Sums by operator, of the phase under way; `kernels` has them one by one where somebody asks for it:
    how many of `events` came before, the phase, and the kernel."""

    flops: Counter[tuple[str, str]] = field(default_factory=Counter)  # by phase and name
    nbytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    count: Counter[tuple[str, str]] = field(default_factory=Counter)
    events: Sized = ()
    kernels: list[tuple[int, str, Kernel]] | None = None

    def add(self, phase: str, kernel: Kernel) -> None:
        """A kernel has run."""
        key = phase, kernel.name
        self.count[key] += 1
        self.flops[key] += int(kernel.flops)
        self.nbytes[key] += kernel.nbytes
        if self.kernels is not None:
            self.kernels.append((len(self.events), phase, kernel))

    def clear(self) -> None:
        """From here on anew."""
        for counts in (self.flops, self.nbytes, self.count):
            counts.clear()


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of what is looked at, not of what lies behind it."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bytes_of(func: Any, read: Sequence[Tensor], written: Sequence[Tensor]) -> int:
    """Bytes that one operator reads and writes: of what it selects from, as much as it gives."""
    name, out = func._schema.name.partition("::")[2], size_of(written)
    if name in _NOTHING:
        return 0
    if name in _SELECTING:
        return 2 * out
    return out if name in _FILLING else size_of(read) + out


def flops_of(func: Any, args: tuple[Any, ...], out: Any, bounds: Callable[[Tensor], Tensor]) -> float:
    """Of one operator; 0 for those that multiply nothing.

    Args:
        bounds: gives a small device tensor's values, where the host made them.
    """
    packet = func._overloadpacket
    if packet in (_aten.mm, _aten.bmm):
        return _product(*args[:2])
    if packet in (_aten.addmm, _aten.addmm_, _aten.baddbmm):
        return _product(*args[1:3])
    if packet is _FLASH_FORWARD:
        q, (cu_q, cu_k), causal = args[0], args[3:5], args[8]
    elif packet is _FLASH_BACKWARD:
        q, (cu_q, cu_k), causal = args[1], args[6:8], args[11]
    elif packet in (_SDPA_FORWARD, _SDPA_BACKWARD, _aten.convolution, _aten.convolution_backward):
        return float(flop_registry[packet](*args, out_val=out))
    else:
        return 0.0
    products = 2 if packet is _FLASH_FORWARD else 5
    heads, width = int(q.shape[1]), int(q.shape[2])
    return 2.0 * products * _pairs(bounds(cu_q), bounds(cu_k), causal) * heads * width


def _product(a: Tensor, b: Tensor) -> float:
    """[..., m, k] x [..., k, n]."""
    return 2.0 * a.numel() * b.shape[-1]


def _pairs(queries: Tensor, keys: Tensor, causal: bool) -> float:
    """(query, key) pairs of varlen attention, bottom-right causal."""
    q, k = queries.diff().double(), keys.diff().double()
    pairs = q * k - (q * (q - 1) / 2 if causal else 0)
    return float(pairs.clamp(min=0).sum())


def attention_workspace(func: Any, args: tuple[Any, ...], multiprocessors: int, deterministic: bool) -> int:
    """Bytes that FlashAttention 2's backward allocates inside: dq in fp32, softmax sums, expanded dk and dv.

    Deterministic, it holds dq ceil(multiprocessors / (segments x heads)) times
    (flash_api.cpp of flash-attention 2, `dq_accum`).
    """
    if func._overloadpacket is _FLASH_BACKWARD:
        q, k, cu_q = args[1], args[2], args[6]
        segments, (tokens, heads, dim), key_heads, keys = cu_q.numel() - 1, q.shape, k.shape[1], k.shape[0]
    else:
        q, k = args[1], args[2]
        segments, heads, tokens, dim = q.shape
        key_heads, keys, tokens = k.shape[1], segments * k.shape[2], segments * tokens
    copies = max(1, -(-multiprocessors // (segments * heads))) if deterministic else 1
    padded = tokens + 128 * segments
    size = rounded(copies * padded * heads * dim * 4) + rounded(heads * padded * 4)
    if key_heads != heads:
        size += 2 * rounded(keys * heads * dim * q.element_size())
    return size


def has_workspace(func: Any) -> bool:
    """Whether `attention_workspace` knows it."""
    return func._overloadpacket in (_FLASH_BACKWARD, _SDPA_BACKWARD)
