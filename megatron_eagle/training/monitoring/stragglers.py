"""Which rank is slower than the others, or than it was: straggler detection of nvidia-resiliency-ext.

Each rank times its own waiting for data, and (through CUPTI) the kernels of its forward and backward. Every
`interval_seconds` the ranks compare: a rank slower than 1 / `threshold` times the fastest, or its own best,
is an event. Its in-job and in-process restarts are not used: see docs/training.md.
"""

import importlib
import importlib.util
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch

from megatron_eagle.errors import UserError
from megatron_eagle.ranges import Range, Ranged
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.training.monitoring.observer import Observer, Step


@dataclass
class StragglerConfig(Ranged):
    """How often the ranks compare, and below which share of the best speed one is a straggler."""

    interval_seconds: Annotated[float, Range(1, 10**6)] = 300.0  # between two comparisons
    threshold: Annotated[float, Range(0.01, 0.99)] = 0.7  # share of the best speed
    every: Annotated[int, Range(1, 10**6)] = 1  # time one of so many iterations

    def check(self) -> None:
        """Ask for the library before anything has started.

        Raises:
            UserError: nvidia-resiliency-ext is not installed.
        """
        if importlib.util.find_spec("nvidia_resiliency_ext") is None:
            raise UserError(
                "resilience.stragglers: nvidia-resiliency-ext is not installed; `pip install "
                "nvidia-resiliency-ext`, or leave this section out"
            )


# Where releases of the library have the detector: 0.6 and 0.7; 0.4.
_PLACES = ("nvidia_resiliency_ext.attribution.straggler", "nvidia_resiliency_ext.straggler")


def _find_detector() -> Any:
    for place in _PLACES:
        with suppress(ModuleNotFoundError):
            return importlib.import_module(place).Detector
    raise AgreedError(
        "resilience.stragglers: this nvidia-resiliency-ext has its straggler detection elsewhere than 0.4 to "
        "0.7; install one of those, or leave this section out"
    )


# Phases of a step that are timed, and whether the CUDA kernels that it launches are timed one by one.
_TIMED = {"data": False, "forward and backward": True}


class Stragglers(Observer):
    """Times phases of the step while it is open; does nothing without a configuration.

    Raises:
        AgreedError: when it is entered on a machine without CUDA's CUPTI, which times kernels, or with a
            release of the library that has no detector where this one looks.
    """

    def __init__(self, config: StragglerConfig | None) -> None:
        self._config = config
        self._detector: Any = None
        self._phase = ExitStack()

    def __enter__(self) -> Self:
        if self._config is not None:
            try:
                importlib.import_module("nvrx_cupti_module")
            except ImportError as error:
                raise AgreedError(
                    f"resilience.stragglers: nvidia-resiliency-ext cannot time kernels here ({error}): it "
                    "needs CUDA's CUPTI; leave this section out"
                ) from None
            self._detector = _find_detector()
            self._detector.initialize(
                gather_on_rank0=True,
                profiling_interval=self._config.every,
                report_time_interval=self._config.interval_seconds,
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self._phase.close()
        if self._detector is not None:
            self._detector.shutdown()
            self._detector = None

    def phase(self, iteration: int, name: str) -> None:
        self._phase.close()
        if self._detector is not None and name in _TIMED:
            self._phase.enter_context(self._detector.detection_section(name, profile_cuda=_TIMED[name]))

    def step_ended(self, step: Step, tell: Observer) -> None:
        """Where the interval has passed, compare and tell the stragglers. Collective."""
        if self._config is None or self._detector is None:
            return
        report = self._detector.generate_report_if_interval_elapsed()
        if report is None or torch.distributed.get_rank() != 0:
            return
        share = self._config.threshold
        found = report.identify_stragglers(
            gpu_rel_threshold=share,
            section_rel_threshold=share,
            gpu_indiv_threshold=share,
            section_indiv_threshold=share,
        )
        than = {"relative": "than the fastest rank", "individual": "than it was"}
        for kind, words in than.items():
            slow = {"GPU": found[f"straggler_gpus_{kind}"], **found[f"straggler_sections_{kind}"]}
            for what, ranks in slow.items():
                for straggler in sorted(ranks, key=lambda s: s.rank):
                    reason = f"rank {straggler.rank} on {straggler.node} is slower {words}: {what}"
                    tell.event(step.iteration, "straggler", reason, rank=straggler.rank)
