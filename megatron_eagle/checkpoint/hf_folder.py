"""`C/hf`: what an export to Hugging Face needs and training does not touch, given to a run's checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_eagle.data.store.manifest import read_manifest
from megatron_eagle.hf_model.media_files import DEFAULT_MAX_FRAMES
from megatron_eagle.runtime.agreement import raise_together

HF_FOLDER = "hf"


def save_hf_folder(root: str | Path, *, checkpoint: str | Path | None, data: str | Path) -> None:
    """Give `root` its `hf/` folder, if it has none: that of `checkpoint`, else the tokenizer of `data`.
    Pictures are cut and videos sampled as in `data`.

    Collective.

    Raises:
        UserError: neither source exists or `root` cannot be written.
    """
    problem = None
    if torch.distributed.get_rank() == 0 and not (Path(root) / HF_FOLDER).exists():
        source = Path(data) / "tokenizer" if checkpoint is None else Path(checkpoint) / HF_FOLDER
        partial = Path(root) / f".{HF_FOLDER}.saving"
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            manifest, fresh = read_manifest(data), checkpoint is None
            add_tiling(partial, manifest.sampling, fresh=fresh)
            if any(counts.get("frames_kept") for counts in manifest.counts.values()):
                add_frames(partial, manifest.sampling["max_frames"], fresh=fresh)
            partial.rename(Path(root) / HF_FOLDER)
        except OSError as error:
            problem = f"{root}: cannot give the checkpoint a copy of {source}: {error}"
    raise_together(problem)


def add_tiling(folder: Path, sampling: dict[str, Any], *, fresh: bool) -> None:
    """Put how the data's pictures were cut into the settings of the exported processor, where it differs.

    The most tiles of a picture are the data's where the weights are `fresh`; others may have been trained
    with more before, so that data raise them and never lower them.
    """
    settings = folder / "preprocessor_config.json"
    config, stated = (_read(path) for path in (folder / "config.json", settings))
    ours = {"tiling": "iap", "use_thumbnail": True, "min_dynamic_tiles": 1}
    before = {**ours, **config, **stated}
    known = 1 if fresh else before.get("max_dynamic_tiles", before.get("max_dynamic_patch", 12))
    limit = max(known, sampling["max_tiles"])
    cut = {**ours, "tiling": sampling.get("tiling", "iap"), "max_dynamic_tiles": limit}
    if chosen := {key: value for key, value in cut.items() if before.get(key) != value}:
        settings.write_text(json.dumps(stated | chosen))


def add_frames(folder: Path, most: int, *, fresh: bool) -> None:
    """Put how many frames of a video the data show at `most` into the settings of the exported processor; as
    with tiles, data never lower what weights that are not `fresh` may have been trained with."""
    path = folder / "processor_config.json"
    stated = _read(path)
    known = 1 if fresh else stated.get("max_frames", DEFAULT_MAX_FRAMES)
    path.write_text(json.dumps({**stated, "max_frames": max(known, most)}))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
