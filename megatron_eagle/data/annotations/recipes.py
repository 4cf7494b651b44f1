"""Recipes of other projects as entries of our own: LLaVA's YAML, LLaMA-Factory's dataset_info.json."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_eagle.errors import UserError

_BRACES = re.compile(r"^(.*)\{([^{}]*)\}(.*)$", re.DOTALL)
_REMOTE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name", "script_url")
_INFO_KEYS = frozenset(
    ("file_name", "formatting", "columns", "tags", "ranking", "split", "subset", "folder", "num_samples")
    + ("load_from", *_REMOTE)
)
# LLaMA-Factory's names of columns, by those that the dialects know.
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_REFUSED = ("kto_tag", "chosen", "rejected")


def llava_entries(content: object, where: str) -> dict[str, dict[str, Any]] | None:
    """The entries of LLaVA's `datasets: [{json_path, sampling_strategy}]`; None if `content` is none.

    Raises:
        UserError: an entry of it is not as LLaVA writes them.
    """
    items = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(items, list) or not items:
        return None
    entries: dict[str, dict[str, Any]] = {}
    for item in items:
        if not isinstance(item, dict) or not isinstance(item.get("json_path"), str):
            raise UserError(f"{where}: each of its datasets needs json_path: FILE")
        entry = {"annotation" if key == "json_path" else key: value for key, value in item.items()}
        entry["annotation"] = _expanded(item["json_path"])
        name = stem = Path(item["json_path"]).stem
        number = 1
        while name in entries:
            number += 1
            name = f"{stem}-{number}"
        entries[name] = entry
    return entries


def _expanded(path: str) -> str | list[str]:
    """`a/{b,c}.json` is two files."""
    match = _BRACES.match(path)
    return [f"{match[1]}{part.strip()}{match[3]}" for part in match[2].split(",")] if match else path


def llama_factory_entries(
    content: object, folder: Path, where: str, chosen: Sequence[str] | None = None
) -> dict[str, dict[str, Any]] | None:
    """The entries of a `dataset_info.json` in `folder`, or those `chosen`; None if `content` is none.

    Raises:
        UserError: a data set that lies elsewhere, and for preferences.
    """
    if not isinstance(content, dict) or not _is_info(content):
        return None
    names = list(content) if chosen is None else list(chosen)
    if missing := [name for name in names if name not in content]:
        raise UserError(f"{where} has no data set {missing[0]}; it has {', '.join(content)}")
    entries = {}
    for name in names:
        info = content[name]
        if unknown := [key for key in info if key not in _INFO_KEYS]:
            raise UserError(
                f'{where}, "{name}": unknown key "{unknown[0]}"; known are {", ".join(_INFO_KEYS)}'
            )
        if not isinstance(info.get("file_name"), str):
            raise UserError(
                f'{where}, "{name}" lies elsewhere ({" or ".join(k for k in _REMOTE if k in info)}); '
                "choose others with datasets: [NAME, ...], or fetch it first"
            )
        columns, tags = info.get("columns") or {}, info.get("tags") or {}
        if info.get("ranking") or any(key in columns for key in _REFUSED):
            raise UserError(f'{where}, "{name}" holds preferences, which are not learned here')
        if info.get("formatting", "alpaca") == "alpaca":
            columns = {_ALPACA.get(key, key): value for key, value in columns.items()}
        elif info["formatting"] == "sharegpt":
            columns = {"messages": columns.get("messages", "conversations"), **columns}
            tags = {"role_tag": "from", "content_tag": "value", **tags}
        else:
            raise UserError(
                f'{where}, "{name}": formatting {info["formatting"]!r} is neither alpaca nor sharegpt'
            )
        entries[name] = {"annotation": str(folder / info["file_name"]), "columns": columns, "tags": tags}
    return entries


def _is_info(content: Mapping[str, Any]) -> bool:
    return bool(content) and all(
        isinstance(info, dict) and any(key in info for key in ("file_name", *_REMOTE))
        for info in content.values()
    )
