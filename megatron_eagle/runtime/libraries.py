"""Optional libraries for the GPU, found by importing them: without them Megatron has mocks of their names."""

import importlib
from types import ModuleType

import torch


def why_not_library(module: str) -> str | None:
    """Why a library for the GPU cannot be used here, or None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return f"{module} does not import: {error}"
    return None


def import_or_none(module: str) -> ModuleType | None:
    """The module, if it can be imported."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return None
