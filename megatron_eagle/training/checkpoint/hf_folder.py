"""`C/hf`: what an export to Hugging Face needs and training does not touch, given to a run's checkpoints."""

import json
import shutil
from pathlib import Path

import torch

from megatron_eagle.data.store import read_manifest
from megatron_eagle.training.agreement import raise_together

HF_FOLDER = "hf"


def save_hf_folder(root: str | Path, *, checkpoint: str | Path | None, data: str | Path) -> None:
    """Give `root` its `hf/` folder, if it has none: that of `checkpoint`, else the tokenizer and the tile
    limit of `data`.

    Collective. Raises `UserError` if neither source exists or `root` cannot be written.
    """
    problem = None
    if torch.distributed.get_rank() == 0 and not (Path(root) / HF_FOLDER).exists():
        source = Path(data) / "tokenizer" if checkpoint is None else Path(checkpoint) / HF_FOLDER
        partial = Path(root) / f".{HF_FOLDER}.saving"
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            if checkpoint is None:
                limits = {"max_dynamic_tiles": read_manifest(data).sampling["max_tiles"]}
                (partial / "preprocessor_config.json").write_text(json.dumps(limits))
            partial.rename(Path(root) / HF_FOLDER)
        except OSError as error:
            problem = f"{root}: cannot give the checkpoint a copy of {source}: {error}"
    raise_together(problem)
