"""Answers from an exported model (no Megatron) and logits from a training checkpoint.

`logits` is imported on first use, so that generation never imports Megatron.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_eagle.convert.checkpoint_forward import logits

__all__ = ["logits"]


def __getattr__(name: str) -> Any:
    if name == "logits":
        from megatron_eagle.convert.checkpoint_forward import logits

        return logits
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
