"""Determinism is the default: the same run gives the same bits."""

import contextlib
import os
import random
from collections.abc import Iterator

import numpy
import torch


def set_deterministic(seed: int, *, algorithms: bool = True) -> None:
    """Seed every generator of this process, and choose deterministic algorithms or leave torch the choice.

    cuBLAS and Transformer Engine read their settings when they are first used: call before the first GPU
    work.
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(algorithms, warn_only=True)
    # Or every torch.empty is filled with NaN: tens of gigabytes written in a step, for what nobody reads.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    if algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")


@contextlib.contextmanager
def strictly_deterministic() -> Iterator[None]:
    """Where deterministic algorithms are asked for with warnings only, attention would warn and not be."""
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if not (torch.are_deterministic_algorithms_enabled() and warn_only):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)
