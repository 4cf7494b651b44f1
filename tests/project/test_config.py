"""Strict configuration: names, types, overrides; every user mistake is one line with its place."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest

from megatron_eagle.config import apply_overrides, from_dict, load_yaml, save_yaml, to_dict
from megatron_eagle.errors import UserError


@dataclass
class Inner:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["cosine", "constant"] = "cosine"


@dataclass
class Section:
    inner: Inner = field(default_factory=Inner)
    steps: int = 1
    name: str | None = None
    names: list[str] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)
    enabled: bool = False
    mixed: int | str = 0


@dataclass
class Root:
    path: str
    section: Section = field(default_factory=Section)
    optional: Inner | None = None

    def __post_init__(self) -> None:
        if self.path == "forbidden":
            raise ValueError("path must be another")


def fails(mapping: dict, *fragments: str) -> None:
    with pytest.raises(UserError) as caught:
        from_dict(Root, mapping)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message


def test_defaults_and_nesting():
    root = from_dict(Root, {"path": "x", "section": {"inner": {"learning_rate": "2e-5", "betas": [0, 0.5]}}})
    assert root.section.inner.learning_rate == 2e-5
    assert root.section.inner.betas == (0.0, 0.5) and isinstance(root.section.inner.betas[0], float)
    assert root.optional is None
    assert from_dict(Root, {"path": "x", "section": None}).section == Section()  # an empty `section:`
    assert (
        from_dict(Root, {"path": "x", "optional": {"schedule": "constant"}}).optional.schedule == "constant"
    )
    assert from_dict(Root, {"path": "x", "section": {"mixed": "a"}}).section.mixed == "a"


@pytest.mark.parametrize(
    ("mapping", "fragments"),
    [
        ({"path": "x", "sectoin": {}}, ["unknown setting 'sectoin'", "did you mean 'section'?"]),
        ({"path": "x", "section": {"step": 3}}, ["'section.step'", "did you mean 'section.steps'?"]),
        (
            {"path": "x", "section": {"inner": {"learning_rat": 1}}},
            ["did you mean 'section.inner.learning_rate'?"],
        ),
        ({"path": "x", "section": {"inner": {"qqq": 1}}}, ["valid here: learning_rate, betas, schedule"]),
        ({"path": "x", "optional": {"beta": 1}}, ["did you mean 'optional.betas'?"]),
        ({"path": "x", 3: 1}, ["unknown setting '3'"]),
        ({}, ["path: missing"]),
        ({"path": "forbidden"}, ["path must be another"]),
        ({"path": 3}, ["path: expected text, got 3; put it in quotes"]),
        ({"path": ""}, ["path: expected text that is not empty, got ''; leave it out for the default"]),
        ({"path": "x", "section": {"steps": True}}, ["section.steps: expected a whole number, got true"]),
        ({"path": "x", "section": {"steps": 1.5}}, ["section.steps: expected a whole number, got 1.5"]),
        ({"path": "x", "section": {"steps": None}}, ["section.steps: expected a whole number, got null"]),
        ({"path": "x", "section": {"enabled": 1}}, ["section.enabled: expected true or false, got 1"]),
        ({"path": "x", "section": {"names": "a"}}, ["section.names: expected a list, got 'a'"]),
        ({"path": "x", "section": {"names": ["a", 1]}}, ["section.names[1]: expected text, got 1"]),
        ({"path": "x", "section": {"table": {"k": "v"}}}, ["section.table.k: expected a whole number"]),
        ({"path": "x", "section": {"mixed": 1.5}}, ["section.mixed: expected a whole number or text"]),
        ({"path": "x", "section": 5}, ["section: expected a mapping of settings, got 5"]),
        ({"path": "x", "section": {"inner": {"betas": [1]}}}, ["section.inner.betas: expected a list of 2"]),
        ({"path": "x", "section": {"inner": {"learning_rate": "fast"}}}, ["expected a number, got 'fast'"]),
        ({"path": "x", "section": {"inner": {"learning_rate": "nan"}}}, ["expected a finite number"]),
        ({"path": "x", "section": {"inner": {"learning_rate": True}}}, ["expected a number, got true"]),
        (
            {"path": "x", "section": {"inner": {"schedule": "cosin"}}},
            ["section.inner.schedule: 'cosin' is not one of 'cosine', 'constant'", "did you mean 'cosine'?"],
        ),
    ],
)
def test_mistakes(mapping, fragments):
    fails(mapping, *fragments)


def test_overrides():
    base = {"path": "x", "section": {"steps": 1}}
    changed = apply_overrides(
        base,
        [
            "section.steps=7",
            "section.inner.betas=[0.1, 0.2]",
            "path=a=b",
            "section.name=",
            "optional.schedule=constant",
        ],
    )
    root = from_dict(Root, changed)
    assert (root.section.steps, root.section.inner.betas, root.path) == (7, (0.1, 0.2), "a=b")
    assert root.section.name is None and root.optional.schedule == "constant"
    assert base == {"path": "x", "section": {"steps": 1}}, "the input is not changed"


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("section.steps", "expected NAME=VALUE"),
        ("=3", "expected NAME=VALUE"),
        ("section..steps=3", "expected NAME=VALUE"),
        ("section.steps.deep=3", "section.steps is a value, not a section"),
        ("section.names=[a", "not valid YAML"),
    ],
)
def test_bad_overrides(override, fragment):
    with pytest.raises(UserError, match=fragment.replace(".", r"\.")):
        apply_overrides({"section": {"steps": 1}}, [override])


def test_typo_in_override_is_found_by_from_dict():
    fails(apply_overrides({"path": "x"}, ["section.iner.betas=[1, 2]"]), "did you mean 'section.inner'?")


def test_yaml_round_trip(tmp_path):
    root = from_dict(Root, {"path": "ü", "section": {"names": ["a"], "table": {"k": 1}}, "optional": {}})
    save_yaml(root, tmp_path / "run.yaml")
    assert from_dict(Root, load_yaml(tmp_path / "run.yaml")) == root
    assert to_dict(root)["section"]["inner"]["betas"] == [0.9, 0.999]


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("a: [1", "not valid YAML"),
        ("- a", "expected a mapping of settings at the top level"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "the key 'c' appears twice (line 4"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
        (f"a: {'9' * 5000}", "not valid YAML: Exceeds the limit"),
        ("a: 2024-13-45", "not valid YAML: month must be in 1..12"),
    ],
)
def test_broken_files(tmp_path, text, fragment):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_yaml(file)
    assert fragment in str(caught.value) and str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_yaml(tmp_path / "absent.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_yaml(tmp_path / "empty.yaml") == {}


def test_fields_not_in_init_are_left_out():
    @dataclass
    class Derived:
        a: int = 1
        b: int = dataclasses.field(init=False, default=2)

    assert to_dict(Derived()) == {"a": 1}
