"""Transformer Engine's buffers for tensor parallel communication beside products (`tp_comm_overlap`)."""

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_eagle.errors import UserError

_MODULE = "transformer_engine.pytorch.module.base"


@contextmanager
def tensor_parallel_buffers(
    wanted: bool, rows: int, hidden_size: int, size: int, fp8: bool
) -> Iterator[None]:
    """Registered while it is entered, if `wanted`. Collective. Written, not yet run.

    Args:
        rows: of the hidden states before sequence parallelism divides them.
        size: tensor parallel ranks.
    Raises:
        UserError: Transformer Engine is not here, or makes buffers from other arguments.
    """
    if not wanted:
        yield
        return
    try:
        base = importlib.import_module(_MODULE)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"parallel.tp_comm_overlap: {_MODULE} does not import: {error}") from None
    base.initialize_ub(**buffer_arguments(base, rows, hidden_size, size, fp8))
    try:
        yield
    finally:
        base.destroy_ub()


def buffer_arguments(base: Any, rows: int, hidden_size: int, size: int, fp8: bool) -> dict[str, Any]:
    """What this Transformer Engine's `initialize_ub` takes.

    Raises:
        UserError: it takes something else.
    """
    known = inspect.signature(base.initialize_ub).parameters
    arguments = {"shape": [rows, hidden_size], "tp_size": size}
    if "quantization_modes" in known:  # from 2.7 on
        modes = base.UserBufferQuantizationMode
        arguments["quantization_modes"] = [modes.FP8 if fp8 else modes.NONE]
    else:
        arguments["use_fp8"] = fp8
    if unknown := sorted(arguments.keys() - known.keys()):
        raise UserError(
            f"parallel.tp_comm_overlap: this Transformer Engine's initialize_ub takes no "
            f"{', '.join(unknown)}; "
            "set it to false"
        )
    return arguments
