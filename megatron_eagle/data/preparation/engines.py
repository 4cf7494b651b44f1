"""Where lines are processed: in this process, in a pool of processes, or on a Ray cluster.

Outcomes come in the order of the input, whoever computed them, and only so much is worked on ahead.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from itertools import islice
from multiprocessing.connection import wait
from typing import TypeVar

from megatron_eagle.data.preparation.processor import Outcome, PreprocessSettings, SampleProcessor, Task
from megatron_eagle.errors import UserError

ENGINES = ("local", "ray")
_AHEAD = 4  # chunks per worker that are handed out before the first is asked for

Chunks = Iterable[list[Task]]
T = TypeVar("T")
R = TypeVar("R")


def lines_ahead(workers: int, chunk: int) -> int:
    """How many lines may be in work beyond the last one whose outcome was taken."""
    return _AHEAD * workers * chunk


def run_local(chunks: Chunks, settings: PreprocessSettings, workers: int) -> Generator[Outcome, None, None]:
    """Process chunks of lines on this machine; with one worker in this process.

    Raises:
        UserError: a worker dies.
    """
    if workers <= 1:
        processor = SampleProcessor(settings)
        for chunk in chunks:
            yield from map(processor.process, chunk)
        return
    yield from in_processes(partial(_work, settings), chunks, workers)


def in_processes(function: Callable[[T], Iterable[R]], items: Iterable[T], workers: int) -> Iterator[R]:
    """What `function` makes of each item, computed in several processes of this machine.

    Raises:
        UserError: a worker dies.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer's threads half-alive
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        items = iter(items)
        waiting = deque(pool.submit(function, item) for item in islice(items, _AHEAD * workers))
        try:
            while waiting:
                yield from waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(items, 1))
        except BrokenProcessPool:
            raise UserError(
                "a worker process died, probably for want of memory; try fewer --workers and run the same "
                "command again, it continues where it stopped"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has one"

    def leave_with_parent() -> None:  # whom SIGKILL may take without a word
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


@lru_cache(maxsize=1)
def _processor(settings: PreprocessSettings) -> SampleProcessor:
    return SampleProcessor(settings)


def _work(settings: PreprocessSettings, tasks: list[Task]) -> list[Outcome]:
    return [_processor(settings).process(task) for task in tasks]


def ray_workers() -> int:
    """Connect to the Ray cluster that `RAY_ADDRESS` or this machine knows, or start one here; its cores.

    Raises:
        UserError: Ray is not installed or cannot be reached.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--engine ray needs Ray: pip install 'megatron-eagle[cluster]'") from None
    try:
        ray.init(ignore_reinit_error=True, log_to_driver=False)
    except Exception as error:  # connection, version and configuration problems have no common type
        raise UserError(f"cannot reach or start a Ray cluster: {' '.join(str(error).split())}") from None
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def run_ray(chunks: Chunks, settings: PreprocessSettings, workers: int) -> Generator[Outcome, None, None]:
    """Process chunks of lines on the connected Ray cluster, `workers` at a time.

    Annotations are read here; the tokenizer and media must lie under the same paths on every node.  Work of a
    node that is lost is done again elsewhere.

    Raises:
        UserError: a task fails for good.
    """
    import ray

    remote = ray.remote(num_cpus=1, max_retries=-1)(_work)
    chunks = iter(chunks)
    waiting = deque(remote.remote(settings, chunk) for chunk in islice(chunks, _AHEAD * workers))
    try:
        while waiting:
            yield from ray.get(waiting.popleft())
            waiting.extend(remote.remote(settings, chunk) for chunk in islice(chunks, 1))
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"a Ray task failed: {reason}; run the same command again, it continues where it stopped"
        ) from None
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
