"""The manifest of a checkpoint: size and SHA-256 of every file, written before the folder gets its name.

Every rank hashes what it wrote and, on loading, its share of what there is, so that the time of both is that
of one rank's files. Finding a flipped byte this way costs one read of the checkpoint.
"""

import hashlib
import json
from pathlib import Path

import torch

from megatron_eagle.errors import UserError
from megatron_eagle.training.agreement import raise_together

MANIFEST = "manifest.json"
_BLOCK = 1 << 22  # bytes


def hash_written(folder: Path) -> dict[str, dict]:
    """On rank 0: name -> {"bytes", "sha256"} of the tensor files that all ranks wrote into `folder`.

    Collective. A file is hashed by the rank in its name (`__RANK_N.distcp`), which has it in its page cache.
    Raises `AgreedError` where a file cannot be read.
    """
    own, problem = {}, None
    try:
        own = {
            file.name: _describe(file)
            for file in sorted(folder.glob(f"__{torch.distributed.get_rank()}_*.distcp"))
        }
    except OSError as error:
        problem = f"{folder}: cannot read back what was saved: {error}"
    raise_together(problem)
    gathered: list[dict] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, own)
    return {name: entry for found in gathered for name, entry in found.items()}


def write_manifest(folder: Path, hashed: dict[str, dict]) -> None:
    """Write the manifest of `folder`: `hashed` and every other file in it. On rank 0; raises `OSError`."""
    others = {
        file.name: _describe(file)
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in hashed and file.name != MANIFEST
    }
    text = json.dumps({"files": dict(sorted((hashed | others).items()))}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def verify(folder: Path) -> None:
    """Compare a checkpoint's files with its manifest, if there is one (converters write none).

    Collective. Raises `AgreedError` that names a file which is missing, of another size or of other content.
    """
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    problem = None
    try:
        entries = sorted(_read(folder).items(), key=lambda item: -item[1]["bytes"])
        for name, entry in entries[rank::size]:
            problem = problem or _difference(folder / name, entry)
    except (UserError, OSError) as error:
        problem = str(error)
    raise_together(problem)


def _read(folder: Path) -> dict[str, dict]:
    file = folder / MANIFEST
    if not file.exists():
        return {}
    try:
        files = json.loads(file.read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            if "/" in name or not isinstance(entry["bytes"], int) or len(entry["sha256"]) != 64:
                raise ValueError(f"entry {name!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged, or no manifest of a checkpoint: {error}") from error
    return files


def _difference(file: Path, entry: dict) -> str | None:
    if not file.is_file():
        return f"{file}: missing; copy the checkpoint again in full"
    size = file.stat().st_size
    if size != entry["bytes"]:
        return f"{file}: {size} bytes, and {entry['bytes']} were saved: damaged or cut; copy it again"
    if _describe(file)["sha256"] != entry["sha256"]:
        return f"{file}: its content is not what was saved (SHA-256): damaged; copy it again"
    return None


def _describe(file: Path) -> dict:
    digest, size = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}
