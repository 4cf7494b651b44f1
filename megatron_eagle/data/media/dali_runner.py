"""One DALI pipeline that many threads ask; it is rebuilt after an error, left behind if it stands still."""

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from nvidia.dali import Pipeline


class DaliFailed(Exception):
    """DALI could not process a sample: `args[0]` says why."""


@dataclass
class PipelineJob:
    """Arrays for the graph's inputs by name, the promise of its outputs, and the queue it stands in."""

    inputs: dict[str, np.ndarray]
    outputs: Future[list[np.ndarray]] = field(default_factory=Future)
    queue: "queue.SimpleQueue[PipelineJob | None] | None" = None


class PipelineRunner:
    """Runs the samples of many threads through one pipeline, up to `batch_size` at a time.

    `build` makes the pipeline, in the thread that runs it.
    """

    def __init__(self, build: Callable[[], Pipeline], batch_size: int):
        self._build, self._batch_size = build, batch_size
        self._lock = threading.Lock()
        self._waiting = self._start()

    def submit(self, inputs: dict[str, np.ndarray]) -> PipelineJob:
        """Hand a sample in; where it cannot be processed, the returned `outputs` fails with `DaliFailed`."""
        sample = PipelineJob(inputs)
        with self._lock:
            self._put(sample)
        return sample

    def give_up(self, sample: PipelineJob) -> None:
        """Leave a pipeline that stands still over a sample: what waits behind it goes to a new one.

        The old thread ends when DALI lets it go; the samples of its batch are never answered.
        """
        with self._lock:
            stuck = sample.queue
            if stuck is not self._waiting:  # another one of the batch was quicker
                return
            self._waiting = self._start()
            while not stuck.empty():
                job = stuck.get()
                if job is not None:
                    self._put(job)
            stuck.put(None)

    def close(self) -> None:
        """Let the thread end after what was handed in."""
        self._waiting.put(None)

    def _put(self, sample: PipelineJob) -> None:
        sample.queue = self._waiting
        self._waiting.put(sample)

    def _start(self) -> "queue.SimpleQueue[PipelineJob | None]":
        waiting: queue.SimpleQueue[PipelineJob | None] = queue.SimpleQueue()
        threading.Thread(target=self._serve, args=(waiting,), name="dali", daemon=True).start()
        return waiting

    def _serve(self, waiting: "queue.SimpleQueue[PipelineJob | None]") -> None:
        pipeline = None
        alone: deque[PipelineJob] = deque()  # of a batch that failed, to find out which of them did
        while batch := [alone.popleft()] if alone else self._take(waiting):
            try:
                if pipeline is None:
                    pipeline = self._build()
                outputs = _run(pipeline, batch)
            except Exception as error:  # DALI raises almost anything
                pipeline = None  # one that raised is of no more use
                if len(batch) > 1:
                    alone.extend(batch)
                else:
                    batch[0].outputs.set_exception(DaliFailed(_cause(error)))
            else:
                for sample, arrays in zip(batch, outputs, strict=True):
                    sample.outputs.set_result(arrays)

    def _take(self, waiting: "queue.SimpleQueue[PipelineJob | None]") -> list[PipelineJob]:
        """What is waiting, at least one and at most a batch; empty at the end."""
        batch: list[PipelineJob] = []
        while len(batch) < self._batch_size and (not batch or not waiting.empty()):
            sample = waiting.get()
            if sample is None:
                waiting.put(None)  # again after this batch
                break
            batch.append(sample)
        return batch


def _run(pipeline: Pipeline, batch: list[PipelineJob]) -> list[list[np.ndarray]]:
    for name in batch[0].inputs:
        pipeline.feed_input(name, [sample.inputs[name] for sample in batch])
    outputs = [output.as_cpu() for output in pipeline.run()]
    # Copies: DALI writes the next batch into the same memory.
    return [[np.array(output[i]) for output in outputs] for i in range(len(batch))]


def _cause(error: Exception) -> str:
    """The line of DALI's long message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (b for a, b in zip(lines, lines[1:], strict=False) if a == "encountered:"), lines[0] if lines else ""
    )
