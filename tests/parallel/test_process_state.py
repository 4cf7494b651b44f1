"""Nothing of a run outlives it but what is named here: new state, in Megatron or ours, is noticed."""

import importlib
import logging
import os
import signal
import threading
from contextlib import suppress
from unittest.mock import patch

import pytest
import torch

from megatron_eagle.context_parallel.reference_attention import ReferenceAttention
from tests.parallel.harness import launch
from tests.parallel.process_state import changes, process_state
from tests.training.test_training_loop import train_rank, write_run

PACKAGES = "megatron", "megatron_eagle", "eagle_kernels", "torch.distributed"
# What may differ after runs, and why it cannot make another run wrong.
_ADAM = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer."
_SEEDS = "set again when a run starts"
_ONCE = "the same in every run, whatever its layout"
_TRANSFORMER_ENGINE = "Megatron's GPTModel writes what its attention_backend auto allows: always all"
ALLOWED = {
    "random state of torch": _SEEDS,
    "random state of numpy": _SEEDS,
    "random state of Python": _SEEDS,
    "deterministic algorithms": _ONCE,
    "environment CUBLAS_WORKSPACE_CONFIG": _ONCE,
    "environment NVTE_ALLOW_NONDETERMINISTIC_ALGO": _ONCE,
    "environment NVTE_FLASH_ATTN": _TRANSFORMER_ENGINE,
    "environment NVTE_FUSED_ATTN": _TRANSFORMER_ENGINE,
    "environment NVTE_UNFUSED_ATTN": _TRANSFORMER_ENGINE,
    f"{_ADAM}state_dict": "fix_torch_adam_in_distributed_optimizer, once a process",
    f"{_ADAM}load_state_dict": "as above",
    f"{_ADAM}_get_main_param_and_optimizer_states": "as above",
    f"{_ADAM}_set_main_param_and_optimizer_states": "as above",
    f"{_ADAM}_torch_adam_is_fixed": "as above",
    "megatron.core.optimizer.clip_grads.l2_norm_impl": "use_norm_without_waiting, once a process",
    "megatron.core.tensor_parallel.layers.linear_with_grad_accumulation_and_async_allreduce()": (
        "whether it has warned about CUDA_DEVICE_MAX_CONNECTIONS"
    ),
    "thread tqdm_monitor": "tqdm's own, one a process",
}
RUNS = [
    [
        "parallel.context_parallel_size=2",
        "parallel.ulysses_parallel_size=2",
        "recompute={language: offload, swiglu: true}",
        "layers.loss=fused",
        "lora.rank=2",
        "checkpoint={async_save: true, save_interval: 1}",
        "logging.profile={start: 1, ranks: [0, 1]}",
    ],
    [
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
        "recompute={language: full, vision: full}",
        "logging.tensorboard=true",
    ],
    ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
]


def left_by_runs(config: str) -> dict[str, str]:
    """On each rank: what two iterations of each run change, and one that an error ends inside a layer."""
    for name in ALLOWED:  # a test before this one may have set it
        os.environ.pop(name.removeprefix("environment "), None)
    with suppress(ImportError):  # Megatron-Core 0.19 imports it with the first optimizer; 0.16 has none
        importlib.import_module("megatron.core.models.mimo.optimizer")
    before = process_state(*PACKAGES)
    for number, overrides in enumerate(RUNS):
        paths = [f"checkpoint.path={config}_{number}", "training.stop_at_iteration=2"]
        train_rank(config, 2, [*overrides, *paths])
    with (
        patch.object(ReferenceAttention, "forward", side_effect=RuntimeError("an error in a layer")),
        pytest.raises(RuntimeError),
    ):
        train_rank(config, 2, [*RUNS[1], f"checkpoint.path={config}_error"])
    return changes(before, process_state(*PACKAGES))


def test_nothing_outlives_a_run_but_what_is_allowed(tmp_path):
    write_run(tmp_path)
    ranks = launch(left_by_runs, 2, str(tmp_path / "run.yaml"))
    found = ranks[1] | ranks[0]
    assert {name: change for name, change in found.items() if name not in ALLOWED} == {}
    assert ALLOWED.keys() - found.keys() == set(), "allowed, and not left any more"


MADE_UP = """
from functools import cache
class Kept:
    shared = []
    def method(self): pass
def function(held={}): pass
@cache
def remembered(x): return x
deep, streams = Kept(), {"copy": None}
deep.inside = {"slab": [1]}
"""


def test_every_kind_of_state_is_seen(tmp_path, monkeypatch):
    """What each change adds is named, and nothing else is."""
    (tmp_path / "made_up.py").write_text(MADE_UP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MADE_UP", "0")
    made_up, end = importlib.import_module("made_up"), threading.Event()
    handler = signal.getsignal(signal.SIGUSR2)
    changed = {
        "made_up.new": lambda: setattr(made_up, "new", 1),
        "made_up.Kept.shared": lambda: made_up.Kept.shared.append(1),
        "made_up.Kept.method": lambda: setattr(made_up.Kept, "method", lambda self: None),
        "made_up.function()": lambda: setattr(made_up.function, "warned", True),
        "made_up.remembered()": lambda: made_up.remembered(1),
        "made_up.deep": lambda: made_up.deep.inside["slab"].append(2),
        "made_up.streams": lambda: made_up.streams.update(copy=object()),
        "environment MADE_UP": lambda: os.environ.update(MADE_UP="1"),
        "random state of torch": lambda: torch.rand(1),
        "signal handlers": lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
        "logger made_up": lambda: logging.getLogger("made_up").addFilter(lambda record: True),
        "thread made_up": threading.Thread(target=end.wait, name="made_up").start,
    }
    for name, change in changed.items():
        before = process_state("made_up")
        change()
        [found] = changes(before, process_state("made_up"))
        assert found.startswith(name)
    end.set()
    signal.signal(signal.SIGUSR2, handler)
