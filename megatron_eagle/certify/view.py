"""What one path makes of a sample, and where two paths part first."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What comes first causes what follows: other frames have other times and pixels, other grids other ids.
STAGES = ("frames", "times", "grids", "pixels", "ids")
_FIELDS = {
    "frames": ("frames",),
    "times": ("times", "fps"),
    "grids": ("grids", "tiles"),
    "pixels": ("pixels",),
}


@dataclass(frozen=True)
class View:
    """A sample as one path sees it.

    Attributes:
        ids: of the prompt with its answers.
        media: what `hf_model.vllm_plugin.seen.medium_facts` says of each, pictures first, then videos, in the
            order of their numbers.
    """

    ids: Sequence[int]
    media: Sequence[dict[str, Any]]

    def stage(self, name: str) -> list[Any]:
        """What the view has of a stage, an entry for each medium or token."""
        if name == "ids":
            return list(self.ids)
        return [[medium[key] for key in _FIELDS[name]] for medium in self.media]

    def hashes(self) -> dict[str, str]:
        """Of each stage."""
        return {name: _hash(self.stage(name)) for name in STAGES}


@dataclass(frozen=True)
class Parting:
    """Where a path parts from the one that it is compared with."""

    stage: str
    detail: str

    def __str__(self) -> str:
        return f"{self.stage} ({self.detail})"


def first_parting(expected: View, found: View) -> Parting | None:
    """The first stage in which two views differ; None: they are the same."""
    if len(expected.media) != len(found.media):
        return Parting("frames", f"{len(found.media)} media, not {len(expected.media)}")
    for stage in STAGES:
        ours, theirs = expected.stage(stage), found.stage(stage)
        if ours == theirs:
            continue
        if stage == "ids":
            return Parting(stage, _in_ids(ours, theirs))
        place = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        kind = expected.media[place]["kind"]
        number = sum(medium["kind"] == kind for medium in expected.media[: place + 1])
        return Parting(stage, f"{kind} {number}: {_in_medium(stage, ours[place], theirs[place])}")
    return None


def _in_medium(stage: str, ours: list[Any], theirs: list[Any]) -> str:
    if stage == "pixels":
        return "tiles of other values"
    one, other = next(pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1])
    return f"{_short(other)}, not {_short(one)}"


def _in_ids(ours: list[int], theirs: list[int]) -> str:
    pairs = zip(ours, theirs, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
    if place == min(len(ours), len(theirs)):
        return f"{len(theirs):,} tokens, not {len(ours):,}; the shorter one is the beginning of the other"
    return f"token {place}: {theirs[place]}, not {ours[place]}; {len(theirs):,} tokens and {len(ours):,}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
