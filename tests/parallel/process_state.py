"""What a process keeps outside of function calls: what a layout, a run or a stage may leave behind."""

import functools
import logging
import os
import random
import signal
import sys
import threading
import types

import numpy
import torch

# Attributes that Python itself fills in when an object is first copied, looked at or warned about.
_PYTHONS = ("__dict__", "__weakref__", "__doc__", "__slotnames__", "__annotations__", "_abc_impl")
_FUNCTIONS = types.FunctionType | types.BuiltinFunctionType | functools.partial


def process_state(*packages: str) -> dict[str, str]:
    """Name -> mark of everything that the modules of `packages` hold: two marks are equal as long as nothing
    was put in the thing's place and nothing in it was changed.

    Globals, what the objects and containers among them hold, attributes of classes and functions, filled
    caches; and of the process: loggers' filters and handlers, environment, threads, signal handlers, random
    states, torch's groups and settings.
    """
    found = _of_process()
    for name, module in list(sys.modules.items()):
        if module is None or name.split(".")[0] not in packages:
            continue
        found[name] = "imported"
        for key, value in list(vars(module).items()):
            if key.startswith("__"):
                continue
            found[f"{name}.{key}"] = _mark(value)
            if getattr(value, "__module__", None) != name:
                continue
            if isinstance(value, type):
                for attribute, held in list(vars(value).items()):
                    if attribute not in _PYTHONS:
                        found[f"{name}.{key}.{attribute}"] = _mark(held)
            elif callable(value):
                info = value.cache_info() if hasattr(value, "cache_info") else ""
                held = _mark(getattr(value, "__defaults__", None)), _mark(vars(value)), info
                found[f"{name}.{key}()"] = str(held)
    return found


def changes(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    """Name -> what it was and what it is."""
    names = sorted(before.keys() | after.keys())
    return {
        name: f"{before.get(name)} -> {after.get(name)}"
        for name in names
        if before.get(name) != after.get(name)
    }


def _of_process() -> dict[str, str]:
    found = {f"environment {name}": value for name, value in os.environ.items()}
    for name, logger in list(logging.root.manager.loggerDict.items()):
        for kind in ("filters", "handlers"):
            for held in getattr(logger, kind, ()):
                found[f"logger {name} {kind} {id(held)}"] = str(held)
    found |= {f"thread {thread.name}": str(thread.ident) for thread in threading.enumerate()}
    groups = torch.distributed.distributed_c10d._world
    return found | {
        "signal handlers": str([signal.getsignal(number) for number in signal.Signals]),
        "groups": str([len(groups.pg_map), len(groups.pg_names)]),
        "random state of torch": str(hash(torch.get_rng_state().numpy().tobytes())),
        "random state of numpy": str(hash(numpy.random.get_state()[1].tobytes())),
        "random state of Python": str(hash(random.getstate())),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "gradients": str(torch.is_grad_enabled()),
        "type of new tensors": str(torch.get_default_dtype()),
    }


def _mark(value: object, depth: int = 0) -> str:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, torch.Tensor):
        return f"tensor {id(value)} {tuple(value.shape)} version {value._version}"
    where = f"{type(value).__name__} {id(value)}"
    if depth == 4 or isinstance(value, _FUNCTIONS | type | types.ModuleType | logging.Logger):
        return where
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_mark(k, depth + 1)}: {_mark(v, depth + 1)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_mark(held, depth + 1) for held in value)}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(_mark(held, depth + 1) for held in value))}}}"
    held = getattr(value, "__dict__", None)
    return where if not isinstance(held, dict) else f"{where} {_mark(held, depth + 1)}"
