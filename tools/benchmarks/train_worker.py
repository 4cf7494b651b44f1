"""One rank of a measured training run: `train_worker.py JOB.json`, by itself or under torchrun.

JOB.json: {"config": a run's settings, "mode": "pairs" or "split", "skip": steps to warm up, "result": FILE}.
Both modes run `training.trainer.train` itself; what they measure is put into the loop from outside.

pairs: between two iterations of the loop, on its own model and optimizer, the same microbatches go through
Megatron's schedule and the optimizer alone. Both meet the same machine, and take turns in going first.
split: a clock of sections in the loop (`step_clock`).
"""

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.step_clock import PARTS, StepClock, time_vision, timed_communication  # noqa: E402

from megatron_eagle.data.loading.loader import PackLoader  # noqa: E402
from megatron_eagle.model.eagle import EagleModel  # noqa: E402
from megatron_eagle.model.inputs import InputPlan  # noqa: E402
from megatron_eagle.training import trainer as loop  # noqa: E402
from megatron_eagle.training.loss import megatron_loss  # noqa: E402
from megatron_eagle.training.run_config import complete_run_config  # noqa: E402
from megatron_eagle.training.schedule import TrainingBatch, build_batch  # noqa: E402


class Probe:
    """What the measured loop has built, and what is done when it asks for a batch."""

    def __init__(self) -> None:
        self.models, self.optimizer = [], None

    def build_optimizer(self, config, models):
        """In the place of the loop's: remembers what it builds."""
        self.models, self.optimizer = models, _build_optimizer(config, models)
        return self.optimizer

    def loader(self, *arguments, **settings) -> PackLoader[InputPlan]:
        """In the place of the loop's."""
        loader = PackLoader(*arguments, **settings)
        load = loader.step
        loader.step = lambda consumed: self.batch(load, consumed)
        return loader

    def batch(self, load, consumed: int) -> TrainingBatch:
        raise NotImplementedError


_build_optimizer = loop.build_optimizer


class Pairs(Probe):
    """Wall and CPU seconds of each iteration of the loop and of the bare schedule on the same batch."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self.loop: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []
        self._under_way: list[Any] = []  # inputs of the iteration that the loop is in
        self._left: tuple[float, float] | None = None

    def batch(self, load, consumed: int) -> TrainingBatch:
        arrived = _now()
        if self._left is not None:
            self.loop.append(_since(self._left, arrived))
            if len(self.loop) % 2 == 0:
                self._bare_step(self._under_way)
        batch = load(consumed)
        device = next(self.models[0].parameters()).device
        self._under_way = [build_batch(device, microbatch) for microbatch in batch.microbatches]
        if len(self.loop) % 2 == 0:
            self._bare_step(self._under_way)
        self._left = _now()
        return batch

    def _bare_step(self, inputs: list[Any]) -> None:
        started = _now()
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()

        def forward_step(iterator, model):
            mine = next(iterator)
            return model(mine), lambda losses: megatron_loss(losses, mine.loss_weights)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(inputs),
            model=self.models[0],
            num_microbatches=len(inputs),
            seq_length=self._length,
            micro_batch_size=1,
            forward_only=False,
        )
        self.optimizer.step()
        self.bare.append(_since(started, _now()))

    def result(self, skip: int) -> dict[str, Any]:
        """Medians, and of the loop's time over that of the bare schedule in the same pair."""
        pairs = list(zip(self.loop, self.bare, strict=False))[skip:]
        found = {"pairs": len(pairs)}
        for i, kind in enumerate(("wall", "CPU")):
            found[f"loop, {kind} ms"] = 1000 * median(ours[i] for ours, _ in pairs)
            found[f"bare, {kind} ms"] = 1000 * median(bare[i] for _, bare in pairs)
            found[f"overhead, {kind} %"] = 100 * (median(ours[i] / bare[i] for ours, bare in pairs) - 1)
        return found


class Split(Probe):
    """Seconds of the loop's parts, from the first step after `skip` on."""

    def __init__(self, skip: int) -> None:
        super().__init__()
        self.clock, self._skip, self._steps = StepClock(), skip, 0

    def build_optimizer(self, config, models):
        optimizer = super().build_optimizer(config, models)
        models[0].config.timers = self.clock
        for model in models:
            for module in model.modules():
                if isinstance(module, EagleModel) and module.pre_process:
                    time_vision(self.clock, module)
        step = optimizer.step

        def timed_step():
            with self.clock.section("optimizer"):
                return step()

        optimizer.step = timed_step
        return optimizer

    def batch(self, load, consumed: int) -> TrainingBatch:
        if self._steps == self._skip:
            self.clock.restart()
        self._steps += 1
        with self.clock.section("data"):
            return load(consumed)

    def result(self, skip: int) -> dict[str, Any]:
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
    probe = Pairs(config.data.length) if job["mode"] == "pairs" else Split(job["skip"])
    with ExitStack() as stack:
        stack.enter_context(patch.object(loop, "PackLoader", probe.loader))
        stack.enter_context(patch.object(loop, "build_optimizer", probe.build_optimizer))
        if isinstance(probe, Split):
            stack.enter_context(timed_communication(probe.clock))
        loop.train(config)
    rank = os.environ.get("RANK", "0")
    Path(f"{job['result']}.{rank}").write_text(json.dumps(probe.result(job["skip"])))


if __name__ == "__main__":
    main()
