"""Hugging Face folders in and out of Megatron checkpoints, and weights out of a model that is training.

`stream_weights` is imported on first use, so that folders are read and written without training's code.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_eagle.convert.streaming import stream_weights

__all__ = ["stream_weights"]


def __getattr__(name: str) -> Any:
    if name == "stream_weights":
        from megatron_eagle.convert.streaming import stream_weights

        return stream_weights
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
