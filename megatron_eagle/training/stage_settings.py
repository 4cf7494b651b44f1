"""What a file of stages says of each of them, before any of it is a run: settings by name.

The form of such a file: stages.py. Scripts ask for the names, so that nothing heavy is imported here.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_eagle.config import apply_overrides, load_yaml, nearest
from megatron_eagle.errors import UserError

NO_STAGE = ""  # the name of the one run of a file without stages
# Overrides of these change where all stages lie, not one stage's setting.
_COMMON_PATHS = ("checkpoint.path", "checkpoint.load", "logging.path")


def stage_settings(
    path: str | Path, overrides: Iterable[str] = (), *, stage: str | None = None
) -> dict[str, dict[str, Any]]:
    """Settings of the file's stages, or of `stage` alone, by name; of a file without stages under "".

    Raises:
        UserError: a stage does not exist, or an override is wrong.
    """
    runs = stage_runs(path, overrides, stage)
    return {name: run for name, run in runs.items() if stage is None or name == stage}


def stage_runs(path: str | Path, overrides: Iterable[str], stage: str | None) -> dict[str, dict[str, Any]]:
    """Settings of all runs that the file stands for, in order, by stage, of which `stage` must be one.

    Raises:
        UserError: it is none, a stage changes what is of all, or an override is wrong.
    """
    values, overrides = load_yaml(path), list(overrides)
    sections = values.pop("stages", None)
    if sections is None:
        if stage is not None:
            raise UserError(f"{path}: it has no stages; leave out --stage {stage}")
        return {NO_STAGE: apply_overrides(values, overrides)}
    names = _check_sections(sections, str(path))
    if stage is not None and stage not in names:
        guess = nearest(stage, names)
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise UserError(f"{path}: there is no stage {stage!r}, only {', '.join(names)}{hint}")
    return _resolve(values, dict(zip(names, sections.values(), strict=True)), overrides)


def stage_names(path: str | Path) -> list[str]:
    """The stages of a file, in order.

    Raises:
        UserError: it has none.
    """
    sections = load_yaml(path).get("stages")
    return _check_sections(sections, str(path))


def _check_sections(sections: Any, where: str) -> list[str]:
    if not isinstance(sections, dict) or not sections:
        raise UserError(f"{where}: stages must map names to settings, as in `stages: {{stage1: {{...}}}}`")
    for name, section in sections.items():
        if not re.fullmatch(r"\w[\w.-]*", str(name)):
            raise UserError(f"{where}: stage {name!r} names a folder: use letters, digits, '_', '-' and '.'")
        if not isinstance(section, dict):
            raise UserError(f"{where}: stages.{name}: expected the settings that this stage changes")
        if "model" in section:
            raise UserError(f"{where}: stages.{name}.model: set the one model of all stages at the top level")
        for place in _COMMON_PATHS:
            first, last = place.split(".")
            if last in (section.get(first) or {}):
                raise UserError(
                    f"{where}: stages.{name}.{place}: set {place} at the top level; every stage has a folder "
                    "of its name there, and starts from the stage before it"
                )
    return [str(name) for name in sections]


def _resolve(
    common: dict[str, Any], sections: dict[str, dict[str, Any]], overrides: list[str]
) -> dict[str, dict[str, Any]]:
    """Name -> settings of the run."""
    everywhere = [text for text in overrides if text.partition("=")[0].strip() in _COMMON_PATHS]
    common = apply_overrides(common, everywhere)
    rest = [text for text in overrides if text not in everywhere]
    runs: dict[str, dict[str, Any]] = {}
    previous = None
    for name, section in sections.items():
        run = apply_overrides(_merge(common, section), rest)
        for place in ("checkpoint", "logging"):
            root = (run.get(place) or {}).get("path")
            if root is not None:
                run[place]["path"] = os.path.join(str(root), name)
        if previous is not None and run.get("checkpoint"):
            run["checkpoint"]["load"] = runs[previous]["checkpoint"]["path"]
        runs[name], previous = run, name
    return runs


def _merge(common: Any, section: Any) -> Any:
    """Settings of `section` over those of `common`, level by level."""
    if not isinstance(common, dict) or not isinstance(section, dict):
        return section
    merged = dict(common)
    for key, value in section.items():
        merged[key] = _merge(common[key], value) if key in common else value
    return merged
