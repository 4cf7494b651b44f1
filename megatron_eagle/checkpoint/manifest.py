"""The manifest of a checkpoint: size and SHA-256 of every file, written before the folder gets its name.

Large files are hashed while they are written; on loading, every rank reads its share of what there is.
Finding a flipped byte this way costs one read of the checkpoint.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.errors import UserError
from megatron_eagle.runtime.agreement import agreed

MANIFEST = "manifest.json"
_BLOCK = 1 << 22  # bytes


def write_manifest(folder: Path, hashed: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of `folder`: `hashed` and every other file in it. On rank 0.

    Raises:
        OSError: a file cannot be read, or the manifest not written.
    """
    others = {
        file.name: _describe(file)
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in hashed and file.name != MANIFEST
    }
    text = json.dumps({"files": dict(sorted((hashed | others).items()))}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def verify_files(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Compare a checkpoint's files with its manifest, if there is one (converters of others write none).

    Needs no process group.

    Args:
        part: which share of the files, from 0.
        parts: shares of about equal size.

    Raises:
        UserError: a file is missing, unreadable, of another size or of other content; it is named.
    """
    entries = sorted(_read(folder).items(), key=lambda item: -item[1]["bytes"])
    for name, entry in entries[part::parts]:
        try:
            _check(folder / name, entry)
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be read: {error.strerror}") from error


def verify_together(folder: Path) -> None:
    """As `verify_files`, each rank its share. Collective.

    Raises:
        AgreedError: a file of any share is not what the manifest says.
    """
    with agreed():
        verify_files(folder, torch.distributed.get_rank(), torch.distributed.get_world_size())


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / MANIFEST
    if not file.exists():
        return {}
    try:
        files: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            if "/" in name or not isinstance(entry["bytes"], int) or len(entry["sha256"]) != 64:
                raise ValueError(f"entry {name!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged, or no manifest of a checkpoint: {error}") from error
    return files


def _check(file: Path, entry: dict[str, Any]) -> None:
    if not file.is_file():
        raise UserError(f"{file}: missing; copy the checkpoint again in full")
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise UserError(
            f"{file}: {size} bytes, and {entry['bytes']} were saved: damaged or cut; copy it again"
        )
    if _describe(file)["sha256"] != entry["sha256"]:
        raise UserError(f"{file}: its content is not what was saved (SHA-256): damaged; copy it again")


def _describe(file: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}
