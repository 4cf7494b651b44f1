"""Peak memory and time of a function on a CPU or a GPU."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MEASURED = "measured"


def peak_bytes(step: Callable[[], object], device: str = "cpu") -> int:
    """Largest number of bytes held during `step` beyond those before it: the running sum of torch.profiler's
    memory events on a CPU, the caching allocator's own count on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        with record_function(_MEASURED):
            kept = step()
        del kept
    events = profiler.profiler.kineto_results.events()
    (measured,) = [event for event in events if event.name() == _MEASURED]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for moment, change in changes:
        if measured.start_ns() <= moment <= measured.end_ns():
            held += change
            peak = max(peak, held)
    return peak


def seconds(step: Callable[[], object], device: str = "cpu", repeats: int = 1) -> float:
    """Median time of `step` after a warm-up: CPU seconds of this process, or between CUDA events."""
    step()
    found: list[float] = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.process_time()
            step()
            found.append(time.process_time() - begin)
    return median(found)
