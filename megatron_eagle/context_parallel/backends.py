"""The choice of an attention backend, from what really works here."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from megatron.core.transformer.module import MegatronModule

from megatron_eagle.context_parallel.attention import CoreAttention
from megatron_eagle.context_parallel.attention_backend import AttentionBackend
from megatron_eagle.context_parallel.cudnn_attention import CudnnAttention
from megatron_eagle.context_parallel.flash_attention import FlashAttention, FlashAttention3
from megatron_eagle.context_parallel.flash_attention4 import FlashAttention4
from megatron_eagle.context_parallel.reference_attention import ReferenceAttention
from megatron_eagle.context_parallel.te_attention import TransformerEngineAttention
from megatron_eagle.context_parallel.torch_attention import TorchVarlenAttention
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.ring_groups import RingGroups

AttentionName = Literal["auto", "flash4", "flash3", "flash", "torch_varlen", "cudnn", "te", "reference"]


class FastBackend(AttentionBackend, Protocol):
    """A backend that does not work everywhere."""

    def __init__(self) -> None: ...

    @staticmethod
    def why_not() -> str | None:
        """Why it cannot be used here, or None if it can."""


FAST: dict[str, type[FastBackend]] = {
    "flash4": FlashAttention4,
    "flash3": FlashAttention3,
    "flash": FlashAttention,
    "torch_varlen": TorchVarlenAttention,
    "cudnn": CudnnAttention,
}
# What auto tries, best first. FlashAttention 4 and cuDNN only if asked for until they have been measured on a
# GPU, Transformer Engine only to compare with.
AUTO = ("flash3", "flash", "torch_varlen")
# FlashAttention 2 where a kernel of the GPU's own age would be quicker: by the paper of FlashAttention 3
# (arXiv 2407.08608, abstract), forward, on an H100.
_ON_HOPPER = "FlashAttention 2 takes 1.5 to 2 times as long here as FlashAttention 3 (flash_attn_interface)"
LONGEST_REFERENCE = 8192  # keys of a segment; more is not taken on a GPU without asking


@dataclass(frozen=True)
class AttentionChoice:
    """A backend, its name, and why it was taken, in one line."""

    backend: AttentionBackend | None  # None: Transformer Engine, which exchanges keys itself
    name: str
    reason: str

    def build(self, *args: Any, ring: RingGroups, **kwargs: Any) -> MegatronModule:
        """Core attention of one layer, from Megatron's arguments and the layout's groups."""
        if self.backend is None:
            return TransformerEngineAttention(*args, **kwargs)
        return CoreAttention(*args, backend=self.backend, ring=ring, **kwargs)


def choose_attention(name: AttentionName, dtype: torch.dtype, head_dim: int) -> AttentionChoice:
    """The backend that `name` stands for on this machine, for heads of this type and size.

    Raises:
        UserError: it names one that cannot be used here.
    """
    if name == "reference":
        return AttentionChoice(ReferenceAttention(), name, f"attention: {name}")
    if name != "auto":
        if missing := why_not_backend(name, dtype, head_dim):
            raise UserError(f"layers.attention {name}: {missing}; choose another or leave it at auto")
        return AttentionChoice(FAST[name]() if name in FAST else None, name, f"attention: {name}")
    reasons = {fast: why_not_backend(fast, dtype, head_dim) for fast in AUTO}
    for fast, missing in reasons.items():
        if missing is None:
            passed = [f"{other}: {reason}" for other, reason in reasons.items() if reason]
            if fast != "flash3" and is_hopper():
                passed.append(_ON_HOPPER)
            return AttentionChoice(FAST[fast](), fast, f"attention: {fast} ({'; '.join(['auto', *passed])})")
    shared = set(reasons.values())
    why = shared.pop() if len(shared) == 1 else "; ".join(f"{fast}: {text}" for fast, text in reasons.items())
    return AttentionChoice(
        ReferenceAttention(LONGEST_REFERENCE), "reference", f"attention: reference (auto; {why})"
    )


def is_hopper() -> bool:
    """Whether the GPU here is of compute capability 9.x."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def why_not_backend(name: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a fast backend cannot be used here for heads of this type and size, or None if it can."""
    fast = FAST.get(name)
    missing = TransformerEngineAttention.why_not() if fast is None else fast.why_not()
    return missing or unfit(dtype, head_dim)


def unfit(dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no fast backend takes such heads, on any machine, or None if they do."""
    if dtype != torch.bfloat16:
        return f"it computes in bf16 and the model in {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > 256:
        return f"it takes head sizes of 8, 16, ... 256 and the model's is {head_dim}"
    return None
