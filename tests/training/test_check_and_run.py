"""What `train.py check` accepts trains: edge values of every number of a run, in one process on a CPU.

Each value is refused by `check` in one line that names it, or `run` takes a finite step of the optimizer in
which every trainable part has a gradient and moves against it.
"""

import math
import os
import re
import resource
import shutil
import signal
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from megatron_eagle.errors import UserError
from megatron_eagle.model.parts import part_of
from megatron_eagle.ranges import Ranged
from megatron_eagle.runtime.agreement import AgreedError
from megatron_eagle.training.monitoring.observer import Observer
from megatron_eagle.training.preflight import check_runs
from megatron_eagle.training.run_config import RunConfig
from megatron_eagle.training.saves import Saves
from megatron_eagle.training.stages import load_stages
from megatron_eagle.training.train import standard_observers, train
from tests.training.monitoring.test_stragglers import Detector, installed  # noqa: F401 (a fixture)
from tests.training.numeric_fields import NumericField, numeric_fields
from tests.training.picture_run import LENGTH, LR, PACKS, TOKENS, write_picture_run

FIELDS = {field.place: field for field in numeric_fields(RunConfig)}

# Settings without which a number plays no part.
YARN = "model.text.rope_scaling={factor: 2, original_max_position_embeddings: 512}"
EXPERTS = "model.text.experts={num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 48}"
NEEDS = {
    "model.text.head_dim": ["model.text.model_type=qwen3"],
    "data.follow.dead_after_minutes": ["data.follow.shards_per_window=1"],
    "optimizer.first_new_token": ["optimizer.trainable=[vision, connector, new_token_rows]"],
    "optimizer.lr_wsd_decay_fraction": ["optimizer.lr_decay_style=wsd"],
    "recompute.offload_keep_last": ["recompute.language=offload"],
    "resilience.spike_factor": ["resilience.on_spike=skip"],
    "resilience.spike_window": ["resilience.on_spike=skip"],
    "logging.profile.steps": ["logging.profile.start=1"],
    "logging.profile.ranks.*": ["logging.profile.start=1"],
}
NEEDS |= dict.fromkeys((place for place in FIELDS if place.startswith("model.text.rope_scaling.")), [YARN])
NEEDS |= dict.fromkeys(
    (place for place in FIELDS if place.startswith("model.text.experts.")),
    ["model.text.model_type=qwen3_moe", EXPERTS],
)
# The rules between fields that refuse an edge of a range here, by what they say.
RULES = {
    "data.follow.shards_per_window": "was made without preprocess run --follow",
    "data.follow.dead_after_minutes": "was made without preprocess run --follow",
    "data.packs_per_sequence": "does not divide 1, the data parallel size",
    "model.vision.image_size": r"must be a multiple of \d+ \(patch_size\)",
    "model.vision.patch_size": r"its patch size is 14|must be a multiple of \d+ \(patch_size\)",
    "model.vision.num_attention_heads": r"must be a multiple of \d+ \(num_attention_heads\)",
    "model.text.num_attention_heads": r"must be a multiple of \d+ \(num_(key_value|attention)_heads\)",
    "model.text.num_key_value_heads": r"must be a multiple of \d+ \(num_key_value_heads\)",
    "model.text.head_dim": r"must be a multiple of 2 \(a rotary pair\)",
    "model.text.vocab_size": "the data was prepared with another tokenizer",
    "model.image_token_index": "the data was prepared with another tokenizer",
    "model.downsample_ratio": "pixel shuffle|its number of tokens per tile",
    "data.length": f"was prepared for {LENGTH}",
    "training.stop_at_iteration": "must be at most train_iterations 2",
    "parallel.tensor_model_parallel_size": "1 processes cannot hold",
    "parallel.pipeline_model_parallel_size": "1 processes cannot hold",
    "parallel.virtual_pipeline_model_parallel_size": "needs pipeline_model_parallel_size > 1",
    "parallel.context_parallel_size": "1 processes cannot hold",
    "parallel.ulysses_parallel_size": "does not divide context_parallel_size 1",
    "parallel.expert_model_parallel_size": "1 processes cannot be divided into expert tensor 1 x expert 1024",
    "parallel.expert_tensor_parallel_size": "divides (an expert's matrices otherwise|experts, and the model)",
    "parallel.ring_node_size": "is of a ring and context_parallel_comm is auto",
    "parallel.num_layers_in_first_pipeline_stage": "needs pipeline_model_parallel_size > 1",
    "parallel.num_layers_in_last_pipeline_stage": "needs pipeline_model_parallel_size > 1",
    "optimizer.min_lr": f"must be at most lr {LR}",
    "optimizer.lr_warmup_fraction": "must be below training.train_iterations",
    "optimizer.lr_warmup_iterations": "must be below training.train_iterations",
    "optimizer.first_new_token": f"must be below {TOKENS}",
    "evaluation.batches": f"{PACKS} packs of this data.length, and 1000000000 global batches",
    "logging.profile.ranks.*": "the run has 1 process",
}
RULES |= dict.fromkeys(
    (place for place in FIELDS if place.startswith(("model.text.rope_scaling.", "model.text.experts."))),
    "cannot be trained yet|rope_scaling reaches|there are . experts",
)
# Values inside their ranges that are not run here, and why; `check` must take them.
NOT_RUN = {
    ("model.vision.hidden_size", 65536): "a layer of 52 GB",
    ("model.text.hidden_size", 65536): "a layer of 52 GB",
    ("model.text.head_dim", 65536): "a layer of 8 GB",
    ("model.vision.intermediate_size", 262144): "a step of a minute",
    ("model.text.intermediate_size", 262144): "a step of a minute",
    ("model.text.experts.moe_intermediate_size", 262144): "a step of a minute",
    ("model.text.experts.num_experts", 65536): "more than a minute for so many modules",
    ("model.vision.num_hidden_layers", 1024): "a step of a minute",
    ("model.text.num_hidden_layers", 1024): "a step of a minute",
    ("model.text.vocab_size", 2**24): "43 GB of embeddings, gradients and moments",
    ("training.global_batch_size", 10**6): "a million packs",
    ("data.decode_timeout_s", 0.1): "on a busy machine a picture may take longer",
}


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    return write_picture_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(autouse=True)
def surroundings(installed, monkeypatch):  # noqa: F811
    """A library for stragglers that finds none; a disk that nobody waits for."""
    monkeypatch.setattr(Detector, "generate_report_if_interval_elapsed", lambda: None)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def settings(run_file: Path, place: str, value: float) -> list[str]:
    """Overrides that give one number a value in a run where it matters."""
    needed = list(NEEDS.get(place, []))
    if place.startswith("evaluation."):
        needed += [f"evaluation={{data: {run_file.parent / 'store'}, interval: 1}}"]
    # YAML's words; and Python does not write the longest whole numbers in decimals.
    text = hex(value) if isinstance(value, int) else repr(value).replace("inf", ".inf").replace("nan", ".nan")
    if place.endswith(".ranks.*"):
        place, text = place.removesuffix(".*"), f"[{text}]"
    return [*needed, f"{place.replace('.*', '.vision')}={text}"]


def check(run_file: Path, overrides: list[str]) -> RunConfig | str:
    """What `train.py check` makes of a new run: the configuration, or the line that refuses it."""
    shutil.rmtree(run_file.parent / "run", ignore_errors=True)
    try:
        [config] = load_stages(run_file, overrides, world_size=1)
        check_runs([config], 1)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    return config


class Movement(Observer):
    """Watches the first step of the optimizer: by part, squared gradient, and gradient times movement."""

    def __init__(self) -> None:
        self.squares, self.products = defaultdict(float), defaultdict(float)
        self._before = {}

    def observe(self, run, saves: bool):
        """Looks on with those who always do, with or without the one who saves."""
        self._trained = {
            (i, name): p
            for i, model in enumerate(run.models)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        others = [other for other in standard_observers(run) if saves or not isinstance(other, Saves)]
        return [self, *others]

    def phase(self, iteration, name):
        if name == "optimizer":
            self._before = {k: (p.detach().clone(), p.main_grad.clone()) for k, p in self._trained.items()}

    def step_ended(self, step, tell):
        for key, parameter in self._trained.items():
            (value, grad), part = self._before[key], part_of(key[1], parameter)
            assert parameter.isfinite().all(), key
            self.squares[part] += grad.double().square().sum().item()
            self.products[part] += ((parameter.detach() - value).double() * grad.double()).sum().item()


def take_step(config: RunConfig, saves: bool) -> Movement:
    """One step of `run`, with its checkpoint or without; one that hangs or takes 2 GiB more is an error."""
    watched = Movement()

    def hangs(*_):
        raise TimeoutError("no step within 60 s")

    peak, before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    try:
        state = train(config, observe=lambda run: watched.observe(run, saves))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 2**21  # KiB
    assert state.iteration == config.training.last_iteration
    assert all(map(math.isfinite, state.recent_losses))
    return watched


def stands_still(config: RunConfig, part: str) -> bool:
    """Whether the settings say that a part does not move in the first step: its rate is 0 in fp32."""
    optimizer = config.optimizer
    rate = np.float32(optimizer.lr * optimizer.lr_multipliers.get(part, 1.0))
    return rate == 0 or optimizer.warmup_iterations(config.training.train_iterations) > 0


def assert_trains(config: RunConfig, saves: bool = False) -> None:
    step = take_step(config, saves)
    assert step.squares.keys() == set(config.optimizer.trainable)
    for part, square in step.squares.items():
        assert 0 < square < math.inf, f"{part} has no gradient"
        if stands_still(config, part):
            assert step.products[part] == 0, part
        elif not config.optimizer.weight_decay:
            assert step.products[part] < 0, f"{part} does not move against its gradient"


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_edge_values(run_file, field: NumericField):
    inside = [value for value in field.edges if value in field.range]
    assert set(inside) >= {field.range.low, field.range.high}
    for value in field.edges:
        found = check(run_file, settings(run_file, field.place, value))
        if value not in inside:
            assert isinstance(found, str) and field.place.removesuffix(".*") in found, found
            assert str(field.range) in found or ": expected a " in found, found
        elif isinstance(found, str):
            assert field.place in RULES and re.search(RULES[field.place], found), found
        elif (field.place, value) not in NOT_RUN:
            assert_trains(found, saves=field.place.startswith("checkpoint."))


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("model.text.rope_theta=-1", "the loss is nan"),
        ("optimizer.lr_multipliers.vision=-1", "vision does not move against its gradient"),
    ],
)
def test_without_ranges_the_steps_show_what_is_wrong(run_file, monkeypatch, setting, fault):
    """A negative control of `assert_trains`."""
    monkeypatch.setattr(Ranged, "__post_init__", lambda self: None)
    with pytest.raises((AgreedError, AssertionError), match=fault):
        assert_trains(check(run_file, [setting]))


# What a draw goes up to where the whole range would take too long here.
UP_TO = {
    "model.vision.hidden_size": 256,
    "model.text.hidden_size": 256,
    "model.vision.intermediate_size": 512,
    "model.text.intermediate_size": 512,
    "model.vision.num_hidden_layers": 4,
    "model.text.num_hidden_layers": 4,
    "model.text.vocab_size": 5000,
    "training.global_batch_size": 6,
    "training.stop_at_iteration": 2,
    "lora.rank": 64,
}


def draw(field: NumericField, generator: np.random.Generator) -> float:
    """An edge of the range, or a value inside: as likely between 1 and 10 as between 10 and 100."""
    low, high = field.range.low, min(field.range.high, UP_TO.get(field.place, math.inf))
    if generator.random() < 0.3:
        value = generator.choice([low, high])
    else:
        value = math.exp(generator.uniform(math.log(max(low, high * 1e-9)), math.log(high))) if high else 0
    return min(max(field.kind(value), low), high)


@pytest.mark.slow
def test_drawn_values_together(run_file):
    """Five numbers at once, in bf16 every other time, of those that data and layout do not fix here."""
    accepted, free = 0, [place for place in FIELDS if place not in RULES]
    for seed in range(300):
        generator = np.random.default_rng(seed)
        overrides = [f"training.precision={('fp32', 'bf16')[seed % 2]}"]
        for place in generator.choice(free, 5, replace=False):
            overrides += settings(run_file, place, draw(FIELDS[place], generator))
        print(seed, overrides)
        found = check(run_file, overrides)
        if not isinstance(found, str):
            assert_trains(found, saves=True)
            accepted += 1
    assert accepted >= 200
