"""`C/hf`: what an export needs and training does not touch, beside a Megatron checkpoint in the folder C.

    tokenizer files, config.json, generation_config.json, preprocessor_config.json, processor_config.json
                                   as the source has them
    model.safetensors.index.json   the source's shards: tensor -> file
    dtypes.json                    the source's types: tensor -> "F32", "BF16" or "F16"
    carried.safetensors            tensors of the source that the model does not have (the pooling head)

All of it is optional: a model trained from scratch has a tokenizer only, or nothing.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_eagle.checkpoint.hf_folder import HF_FOLDER
from megatron_eagle.convert.pickled import PickledWeights
from megatron_eagle.convert.shards import HF_INDEX, HfWeights, read_json, save
from megatron_eagle.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_SOURCE_FILES = (
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_DTYPES = "dtypes.json"
_TENSORS = "carried.safetensors"


class HfMetadata:
    """Reads `C/hf`; every part may be absent."""

    def __init__(self, checkpoint: str | Path) -> None:
        self.folder = Path(checkpoint) / HF_FOLDER

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the source; empty if there is none."""
        return read_json(self.folder / name) if (self.folder / name).is_file() else {}

    @property
    def weight_map(self) -> dict[str, str]:
        return dict(self.json(HF_INDEX).get("weight_map", {}))

    @property
    def dtypes(self) -> dict[str, str]:
        return self.json(_DTYPES)

    @property
    def tokenizer_files(self) -> list[Path]:
        return [self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()]

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that only pass through, in their own types."""
        path = self.folder / _TENSORS
        if not path.is_file():
            return {}
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or not a safetensors file: {error}") from None


def write_hf_metadata(
    checkpoint: str | Path, source: Path, weights: HfWeights | PickledWeights, names: Iterable[str]
) -> None:
    """Write `C/hf` from the HF folder `source`; `names` are the tensors that only pass through."""
    folder = Path(checkpoint) / HF_FOLDER
    folder.mkdir(parents=True)
    for name in _SOURCE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    (folder / HF_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weights.weight_map}))
    (folder / _DTYPES).write_text(json.dumps(weights.dtypes, indent=1, sort_keys=True))
    write_tensors(checkpoint, {name: weights.read(name) for name in names})


def write_tensors(checkpoint: str | Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors that only pass through into `C/hf`, if there are any."""
    if tensors:
        save(tensors, Path(checkpoint) / HF_FOLDER / _TENSORS)
