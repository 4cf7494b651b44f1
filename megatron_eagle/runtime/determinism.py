"""Determinism is the default: the same run gives the same bits."""

import os
import random

import numpy
import torch


def set_deterministic(seed: int) -> None:
    """Seed every generator of this process and choose deterministic algorithms.

    cuBLAS reads its workspace setting when its handle is created: call before the first GPU work.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
