"""Every number of a run declares its range beside itself, and is refused outside it in one line."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import pytest

from megatron_eagle.config import from_dict
from megatron_eagle.errors import UserError
from megatron_eagle.model.presets import EagleConfig, preset
from megatron_eagle.model.text import TextSection
from megatron_eagle.ranges import Range, Ranged
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.optimizer import OptimizerConfig
from megatron_eagle.training.run_config import RunConfig
from tests.training.numeric_fields import numeric_fields


@dataclass
class Inner(Ranged):
    rate: Annotated[float, Range(0.5, 2)] = 1.0
    shares: dict[str, Annotated[float, Range(0, 1)]] = field(default_factory=dict)


@dataclass
class Outer(Ranged):
    steps: Annotated[int, Range(1, 9)]
    inner: Inner = field(default_factory=Inner)
    pause: Annotated[float, Range(0.1, 60, or_zero=True)] = 0
    sides: tuple[Annotated[int, Range(2, 4)], ...] = (2,)
    maybe: list[Annotated[int, Range(3, 3, why="tiles are RGB")]] | None = None
    mode: Literal["a", "b"] = "a"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "run.steps is 0: must lie between 1 and 9"),
        (
            {"steps": 10**30},
            "run.steps: expected a whole number of at most 64 bits, got a whole number of 100 bits",
        ),
        ({"inner": {"rate": 2.5}}, "run.inner.rate is 2.5: must lie between 0.5 and 2"),
        ({"inner": {"rate": 10**400}}, "run.inner.rate: expected a number, got a whole number of 1329 bits"),
        ({"inner": {"shares": {"x": 1, "y": -1}}}, "run.inner.shares.y is -1.0: must lie between 0 and 1"),
        ({"pause": 0.01}, "run.pause is 0.01: must be 0 or lie between 0.1 and 60"),
        ({"sides": [2, 5]}, "run.sides[1] is 5: must lie between 2 and 4"),
        ({"maybe": [3, 4]}, "run.maybe[1] is 4: must be 3: tiles are RGB"),
    ],
)
def test_a_refusal_names_the_place_the_value_and_the_range(settings, message):
    with pytest.raises(UserError) as caught:
        from_dict(Outer, {"steps": 1, **settings}, "run")
    assert str(caught.value) == message


def test_what_lies_inside_is_taken():
    for settings in ({"steps": 9}, {"pause": 0}, {"sides": [2, 4]}, {"maybe": [3]}, {"maybe": None}):
        from_dict(Outer, {"steps": 1, **settings})


def test_direct_construction_is_checked_too():
    for wrong in (0, math.nan, -1):
        with pytest.raises(ValueError, match="steps is .*: must lie between 1 and 9"):
            Outer(wrong)
    with pytest.raises(ValueError, match="lr is -1: must lie between 0 and 1"):
        replace(OptimizerConfig(), lr=-1)


def test_every_number_of_a_run_has_a_range():
    fields = {found.place: found for found in numeric_fields(RunConfig)}
    assert len(fields) >= 67 and {"optimizer.lr_multipliers.*", "logging.profile.ranks.*"} < fields.keys()
    assert [place for place, found in fields.items() if found.range is None] == []
    for place, found in fields.items():
        assert found.kind(found.range.low) == found.range.low <= found.range.high, place


def test_a_number_without_a_range_is_noticed():
    @dataclass
    class Forgotten:
        inner: Inner
        sizes: list[int] | None = None
        flag: bool = False
        level: Literal[1, 2] = 1

    assert [found.place for found in numeric_fields(Forgotten) if found.range is None] == ["sizes.*"]


def test_a_configuration_of_others_is_checked_as_ones_own():
    hf = preset("eagle2.5-8b").complete().to_hf()
    for section, name, value, message in (
        (
            "text_config",
            "rms_norm_eps",
            -1,
            "config.json: text_config.rms_norm_eps is -1.0: must lie between",
        ),
        ("text_config", "num_key_value_heads", 0, "config.json: text_config.num_key_value_heads is 0: must"),
        ("vision_config", "hidden_size", "wide", "vision_config.hidden_size: expected a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            EagleConfig.from_hf({**hf, section: {**hf[section], name: value}})
    with pytest.raises(UserError, match="config.json.downsample_ratio is 0.0: must lie between"):
        EagleConfig.from_hf({**hf, "downsample_ratio": 0})
    with pytest.raises(ValueError, match="rope_theta is -1: must lie"):
        TextSection(rope_theta=-1)


def test_one_virtual_pipeline_stage_is_none():
    """Megatron takes a size of 1 for interleaving and refuses it with a traceback."""
    assert ParallelConfig(virtual_pipeline_model_parallel_size=1) == ParallelConfig()
