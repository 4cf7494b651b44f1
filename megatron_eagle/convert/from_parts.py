"""Import from parts: a language model and a SigLIP encoder become what stage 1 starts from.

- Rows of tokens that the language model's own tokenizer does not have are the mean of those that it has.
- Position embeddings are resized (bicubic) when tiles are of another size than the encoder's pictures.
- The connector is fresh, drawn as training draws it (`model.initialization`).
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_eagle.checkpoint.hf_folder import HF_FOLDER
from megatron_eagle.convert.checkpoint_files import pieces_of, write_checkpoint
from megatron_eagle.convert.export_files import IMAGE_TOKENS, token_ids
from megatron_eagle.convert.hf_metadata import TOKENIZER_FILES, write_tensors
from megatron_eagle.convert.mapping import ModelMapping
from megatron_eagle.convert.pickled import open_weights
from megatron_eagle.convert.redundant import leave_out_redundant
from megatron_eagle.convert.shards import read_json
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.prompt import IMG_CONTEXT
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.presets import EagleConfig, VisionConfig
from megatron_eagle.model.text import TextConfig

_LANGUAGE, _VISION = "language_model.", "vision_model."
_POSITIONS = "vision_model.vision_model.embeddings.position_embedding.weight"
_ROWS = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
_CONNECTOR = {"0": "layer_norm", "1": "linear_fc1", "3": "linear_fc2"}


@dataclass(frozen=True)
class Parts:
    """Folders to begin from.

    Attributes:
        tokenizer: extends the language model's own by the image tokens.
        tile_size: pixels a side; None: that of the encoder's pictures.
        seed: draws the connector.
        allow_pickle: read `pytorch_model*.bin` where there are no safetensors files.
    """

    language: Path
    vision: Path
    tokenizer: Path
    tile_size: int | None = None
    seed: int = 0
    allow_pickle: bool = False


def import_parts(parts: Parts, checkpoint: str | Path) -> EagleConfig:
    """Write the new checkpoint `checkpoint` (iteration 0). One tensor at a time is in memory.

    Weights are stored as bf16 if both models are bf16, else as fp32. The encoder's pooling head, if there is
    one, passes through to exports; what SigLIP has besides its encoder is left out.

    Returns:
        The model's configuration.

    Raises:
        UserError: a folder is incomplete or of another architecture, the tokenizer does not extend the
            language model's own, or `checkpoint` exists and is not empty.
    """
    target = Path(checkpoint)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not empty; choose a new folder for the checkpoint")
    source = _Source(parts)
    plan = ModelMapping(source.config, has_head=source.has_head)
    plan.check_hf(source.shapes, f"{parts.language} and {parts.vision}")
    partial = target.parent / f".{target.name}.importing"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        (partial / HF_FOLDER).mkdir(parents=True)
        for name in TOKENIZER_FILES:
            if (parts.tokenizer / name).is_file():
                shutil.copyfile(parts.tokenizer / name, partial / HF_FOLDER / name)
        write_tensors(partial, {name: source.read(name) for name in plan.passed_through})
        write_checkpoint(partial, source.config, pieces_of(plan, source.read), source.dtype)
        partial.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot write here: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return source.config


class _Source:
    """The parts under the names of an Eagle 2.5 checkpoint."""

    def __init__(self, parts: Parts) -> None:
        for folder in (parts.language, parts.vision, parts.tokenizer):
            if not folder.is_dir():
                raise UserError(f"{folder}: no such folder")
        self.parts = parts
        self.ids = token_ids(parts.tokenizer)
        self.language, self.vision = (
            open_weights(folder, allow_pickle=parts.allow_pickle) for folder in (parts.language, parts.vision)
        )
        for weights in (self.language, self.vision):
            leave_out_redundant(weights)
        text = TextConfig.from_hf(read_json(parts.language / "config.json"))
        self.known_rows = self._known_rows(text.vocab_size)
        text = replace(text, vocab_size=max(self.ids.values()) + 1)
        encoder = _vision_config(parts.vision)
        self.vision_grid = encoder.image_size // encoder.patch_size
        encoder.image_size = encoder.image_size if parts.tile_size is None else parts.tile_size
        image_token = self.ids[IMG_CONTEXT]
        self.config = EagleConfig(vision=encoder, text=text, image_token_index=image_token).validate()
        self.connector = _connector(self.config, parts.seed)
        self.shapes = self._shapes()
        self.has_head = any(".head." in name for name in self.shapes)
        kinds = {
            *self.language.dtypes.values(),
            *(self.vision.dtypes[n] for n in self._vision_names().values()),
        }
        self.dtype = torch.bfloat16 if kinds == {"BF16"} else torch.float32

    def _known_rows(self, rows: int) -> int:
        """Rows of the language model that its tokenizer uses; checks that the new one extends it."""
        parts = self.parts
        missing = [token for token in IMAGE_TOKENS if token not in self.ids]
        if missing:
            raise UserError(
                f"{parts.tokenizer}: the tokenizer has no token {missing[0]}; add {', '.join(IMAGE_TOKENS)} "
                "as special tokens to the language model's tokenizer"
            )
        old = token_ids(parts.language)
        if not old:
            raise UserError(f"{parts.language}: no tokenizer; it says which rows are trained ones")
        moved = [token for token, i in old.items() if self.ids.get(token) != i]
        if moved:
            raise UserError(
                f"{parts.tokenizer}: token {moved[0]!r} is not {old[moved[0]]} as in {parts.language}; the "
                "tokenizer must be the language model's own with tokens added"
            )
        known = max(old.values()) + 1
        if known > rows:
            raise UserError(f"{parts.language}: its tokenizer's ids reach {known - 1}, its rows {rows - 1}")
        return known

    def _vision_names(self) -> dict[str, str]:
        """Eagle's names -> the vision folder's. transformers 5 saves an encoder alone without its prefix."""
        names = self.vision.shapes
        if not any(name.startswith(_VISION) for name in names):
            return {_VISION + _VISION + name: name for name in names}
        return {_VISION + name: name for name in names if name.startswith(_VISION)}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """As they are after resizing."""
        shapes = {_LANGUAGE + name: shape for name, shape in self.language.shapes.items()}
        shapes |= {name: self.vision.shapes[theirs] for name, theirs in self._vision_names().items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in self.connector.items()}
        if self.config.text.tie_word_embeddings:
            shapes.pop(_ROWS[1], None)  # the embedding, once more
        for name in _ROWS:
            if name in shapes:
                shapes[name] = (self.config.text.vocab_size, *shapes[name][1:])
        if _POSITIONS in shapes:
            shapes[_POSITIONS] = (self.config.vision.num_patches, *shapes[_POSITIONS][1:])
        return shapes

    def read(self, name: str) -> Tensor:
        if name in self.connector:
            return self.connector[name]
        if name.startswith(_VISION):
            tensor = self.vision.read(self._vision_names()[name])
            return self._resized(tensor) if name == _POSITIONS else tensor
        tensor = self.language.read(name.removeprefix(_LANGUAGE))
        return self._with_new_rows(tensor) if name in _ROWS else tensor

    def _with_new_rows(self, table: Tensor) -> Tensor:
        """[v, h] of the language model -> rows for every token; new ones are the mean of the known ones."""
        rows = self.config.text.vocab_size
        result = table.new_empty(rows, table.shape[1])
        known = table[: self.known_rows]
        result[: self.known_rows] = known
        total = torch.zeros(table.shape[1], dtype=torch.float64)
        for part in known.split(4096):
            total += part.double().sum(0)
        result[self.known_rows :] = (total / self.known_rows).to(table.dtype)
        return result

    def _resized(self, positions: Tensor) -> Tensor:
        """[n, c] -> [patches of a tile, c]."""
        old, new = self.vision_grid, self.config.vision.image_size // self.config.vision.patch_size
        if old == new:
            return positions
        grid = positions.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
        return grid.permute(0, 2, 3, 1).reshape(new * new, -1).to(positions.dtype)


def _vision_config(folder: Path) -> VisionConfig:
    """Of a whole SigLIP model, or of its vision encoder alone; defaults are transformers'."""
    from transformers import SiglipVisionConfig

    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in ("siglip", "siglip_vision_model"):
        raise UserError(
            f"{folder}: model_type is {kind!r}; a SigLIP encoder of fixed resolution is needed (siglip or "
            "siglip_vision_model)"
        )
    encoder = config.get("vision_config") or {} if kind == "siglip" else config
    return VisionConfig.from_hf(SiglipVisionConfig(**encoder).to_dict())


def _connector(config: EagleConfig, seed: int) -> Mapping[str, Tensor]:
    """Fresh connector tensors by their HF names, the same that a fresh model of `seed` has."""
    wide, width = config.vision.hidden_size * config.shuffle_factor**2, config.text.hidden_size
    model: Any = torch.nn.Module()
    model.eagle = config
    model.connector = torch.nn.ModuleDict(
        {
            "layer_norm": torch.nn.LayerNorm(wide),
            "linear_fc1": torch.nn.Linear(wide, width),
            "linear_fc2": torch.nn.Linear(width, width),
        }
    )
    initialize_parameters([model], seed)
    return {
        f"mlp1.{number}.{kind}": getattr(model.connector[ours], kind).detach()
        for number, ours in _CONNECTOR.items()
        for kind in ("weight", "bias")
    }
