"""What `torch.cuda` answers for a GPU that is not there: one of a type, always idle."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor

from megatron_eagle.rehearsal.findings import Findings
from megatron_eagle.rehearsal.gpu_types import GpuType
from megatron_eagle.rehearsal.memory import Memory
from megatron_eagle.rehearsal.patches import Patch

DEVICE = torch.device("cuda", 0)


class _Idle:
    """Streams and events: all is done already. The subclasses for a rank note who waits for them."""

    findings: Findings
    waited = ""
    cuda_stream, device = 0, DEVICE

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def nothing(self, *_: Any) -> None:
        """Nobody has to wait."""

    record = wait = wait_stream = wait_event = nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, _end: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        self.findings.sync(self.waited)

    def record_event(self, event: Any = None) -> Any:
        return event or self


class _Generator:
    """Random numbers are nobody's here; its states are the host's."""

    def get_state(self) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_state(self, _state: Any) -> None:
        pass

    def clone_state(self) -> Self:
        return self

    graphsafe_get_state, graphsafe_set_state = clone_state, set_state


def _always(value: Any = None) -> Callable[..., Any]:
    return lambda *_, **__: value


def cuda_answers(gpu: GpuType, findings: Findings, memory: Memory) -> list[Patch]:
    """In place of torch.cuda's own."""
    stream_class = type("Stream", (_Idle,), {"findings": findings, "waited": "a stream is waited for"})
    event_class = type("Event", (_Idle,), {"findings": findings, "waited": "an event is waited for"})
    properties = SimpleNamespace(
        name=gpu.gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        multi_processor_count=gpu.multiprocessors,
        total_memory=int(gpu.gpu.memory),
        warp_size=32,
    )
    stream = stream_class()
    seeds: dict[str, Any] = {
        "get_rng_state": lambda *_, **__: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": _always(),
        "manual_seed": _always(),
        "manual_seed_all": _always(),
    }
    answers: dict[str, Any] = seeds | {
        "is_available": _always(True),
        "is_initialized": _always(True),
        "init": _always(),
        "_lazy_init": _always(),
        "device_count": _always(8),
        "current_device": _always(0),
        "set_device": _always(),
        "get_device_capability": _always(gpu.capability),
        "get_device_properties": _always(properties),
        "get_device_name": _always(gpu.gpu.name),
        "Stream": stream_class,
        "Event": event_class,
        "current_stream": _always(stream),
        "default_stream": _always(stream),
        "stream": _always(nullcontext()),
        "synchronize": lambda *_: findings.sync("the device is waited for"),
        "is_current_stream_capturing": _always(False),
        "empty_cache": _always(),
        "max_memory_allocated": lambda *_: memory.now,
        "memory_allocated": lambda *_: memory.now,
        "reset_peak_memory_stats": _always(),
        "mem_get_info": _always((properties.total_memory,) * 2),
        "default_generators": [_Generator() for _ in range(8)],
    }
    return [
        *((torch.cuda, name, answer) for name, answer in answers.items()),
        *((torch.cuda.random, name, answer) for name, answer in seeds.items()),
        (torch.cuda.nvtx, "range_push", _always()),
        (torch.cuda.nvtx, "range_pop", _always()),
        (torch.backends.cuda, "is_flash_attention_available", _always(True)),
    ]
