"""One rank of a measured training run: `train_worker.py JOB.json`, by itself or under torchrun.

JOB.json: {"config": a run's settings, "mode": "pairs" or "split", "skip": steps to warm up, "result": FILE}.
Both modes run `training.train` itself, with a loader and an observer of their own.

pairs: between two iterations of the loop, on its own model and optimizer, the same microbatches go through
Megatron's schedule and the optimizer alone. Both meet the same machine, and take turns in going first.
split: a clock of sections in the loop (`step_clock`).
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.step_clock import PARTS, StepClock, time_vision, timed_communication  # noqa: E402

from megatron_eagle.data.loading.loader import PackLoader  # noqa: E402
from megatron_eagle.model.eagle import EagleModel, ModelInput  # noqa: E402
from megatron_eagle.model.inputs import InputPlan  # noqa: E402
from megatron_eagle.model.language import Targets  # noqa: E402
from megatron_eagle.training.loss import megatron_loss  # noqa: E402
from megatron_eagle.training.monitoring.observer import Observer, Step  # noqa: E402
from megatron_eagle.training.run_config import complete_run_config  # noqa: E402
from megatron_eagle.training.schedule import TrainingBatch, build_batch  # noqa: E402
from megatron_eagle.training.setup import OpenLoader, Run  # noqa: E402
from megatron_eagle.training.train import standard_observers, train  # noqa: E402


class Pairs(Observer):
    """Wall and CPU seconds of each iteration of the loop and of the bare schedule on the same batch."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.loop: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []
        self._under_way: list[ModelInput[Targets]] = []  # inputs of the iteration that the loop is in
        self._left: tuple[float, float] | None = None

    def begin(self, run: Run) -> None:
        """The run is built."""
        self._models, self._optimizer = run.models, run.optimizer
        self._device = run.device.torch_device

    def asked(self, load: Callable[[int], TrainingBatch], consumed: int) -> TrainingBatch:
        """The loop asks for a batch, and gets that of `load`."""
        arrived = _now()
        if self._left is not None:
            self.loop.append(_since(self._left, arrived))
            if len(self.loop) % 2 == 0:
                self._bare_step(self._under_way)
        batch = load(consumed)
        self._under_way = [build_batch(self._device, microbatch) for microbatch in batch.microbatches]
        if len(self.loop) % 2 == 0:
            self._bare_step(self._under_way)
        self._left = _now()
        return batch

    def _bare_step(self, inputs: list[ModelInput[Targets]]) -> None:
        started = _now()
        for model in self._models:
            model.zero_grad_buffer()
        self._optimizer.zero_grad()

        def forward_step(iterator: Iterator[ModelInput[Targets]], model: torch.nn.Module) -> tuple[Any, Any]:
            mine = next(iterator)
            return model(mine), lambda losses: megatron_loss(losses, mine.targets)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(inputs),
            model=self._models[0],
            num_microbatches=len(inputs),
            seq_length=self._length,
            micro_batch_size=1,
            forward_only=False,
        )
        self._optimizer.step()
        self.bare.append(_since(started, _now()))

    def result(self, skip: int) -> dict[str, float]:
        """Medians, and of the loop's time over that of the bare schedule in the same pair."""
        pairs = list(zip(self.loop, self.bare, strict=False))[skip:]
        found: dict[str, float] = {"pairs": len(pairs)}
        for i, kind in enumerate(("wall", "CPU")):
            found[f"loop, {kind} ms"] = 1000 * median(ours[i] for ours, _ in pairs)
            found[f"bare, {kind} ms"] = 1000 * median(bare[i] for _, bare in pairs)
            found[f"overhead, {kind} %"] = 100 * (median(ours[i] / bare[i] for ours, bare in pairs) - 1)
        return found


class PairedLoader(PackLoader[InputPlan]):
    """Tells `pairs` of every batch that the loop asks for."""

    def __init__(self, pairs: Pairs, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._pairs = pairs

    def step(self, consumed_packs: int) -> TrainingBatch:
        return self._pairs.asked(super().step, consumed_packs)


class Split(Observer):
    """Seconds of the loop's parts, from the first step after `skip` on."""

    def __init__(self, skip: int) -> None:
        self.clock, self._skip, self._steps = StepClock(), skip, 0

    def begin(self, run: Run) -> None:
        """The run is built."""
        run.models[0].config.timers = self.clock
        for model in run.models:
            for module in model.modules():
                if isinstance(module, EagleModel) and module.pre_process:
                    time_vision(self.clock, module)

    def phase(self, iteration: int, name: str) -> None:
        if name == "data":
            if self._steps == self._skip:
                self.clock.restart()
            self._steps += 1
            self.clock.push("data")
        elif name == "forward and backward":
            self.clock.pop()
        elif name == "optimizer":
            self.clock.push("optimizer")

    def step_ended(self, step: Step, tell: Observer) -> None:
        self.clock.pop()

    def result(self, skip: int) -> dict[str, float]:
        """Milliseconds a step, mean over steps and ranks."""
        seconds = self.clock.settle()
        steps = self._steps - skip
        return {f"{part} ms": 1000 * seconds.get(part, 0.0) / steps for part in PARTS}


def _now() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    return end[0] - start[0], end[1] - start[1]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    config = complete_run_config(job["config"])
    probe: Pairs | Split
    if job["mode"] == "pairs":
        probe = pairs = Pairs(config.data.sequence_length)
        open_loader: OpenLoader = partial(PairedLoader, pairs)
        timed: AbstractContextManager[None] = nullcontext()
    else:
        probe = split = Split(job["skip"])
        open_loader, timed = PackLoader, timed_communication(split.clock)

    def observe(run: Run) -> list[Observer]:
        probe.begin(run)
        return [probe, *standard_observers(run)]  # hears of a step before those who always look on

    with timed:
        train(config, open_loader=open_loader, observe=observe)
    rank = os.environ.get("RANK", "0")
    Path(f"{job['result']}.{rank}").write_text(json.dumps(probe.result(job["skip"])))


if __name__ == "__main__":
    main()
