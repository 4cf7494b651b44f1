"""Picture features from a CLIP or SigLIP folder in Hugging Face's format, on the GPU if there is one.

Pictures are prepared here as `preprocessor_config.json` says, because transformers' own processors differ
between versions in the library that resizes.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_eagle.errors import UserError

_MODES = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers of its resampling filters
_FAMILIES = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")


class Encoder:
    """The vision half of a CLIP or SigLIP model.

    `size` is the side of its square input in pixels, `dim` the length d of a feature.

    Raises:
        UserError: the folder is missing, holds another kind of model, or cannot be loaded.
    """

    def __init__(self, folder: str | Path, device: str | None = None, batch_size: int = 64) -> None:
        self.folder = Path(folder)
        config = _read_json(self.folder / "config.json")
        self._settings = _read_json(self.folder / "preprocessor_config.json")
        family = config.get("model_type")
        if family not in _FAMILIES:
            raise UserError(
                f"{self.folder}: model_type is {family!r}; the features come from a CLIP or SigLIP model "
                f"({', '.join(_FAMILIES)})"
            )
        # Before transformers is imported for the first time: it reads them then.
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        kind: Any
        if family.startswith("siglip"):
            kind = transformers.SiglipVisionModel
        elif "CLIPVisionModel" in (
            config.get("architectures") or []
        ):  # an encoder saved without its projection
            kind = transformers.CLIPVisionModel
        else:
            kind = transformers.CLIPVisionModelWithProjection
        try:
            model = kind.from_pretrained(str(self.folder), local_files_only=True, dtype="auto")
        except Exception as error:  # whatever a damaged folder raises
            raise UserError(
                f"{self.folder}: cannot be loaded: {str(error).strip().splitlines()[0]}"
            ) from None
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model = model.eval().to(self.device)
        self._projected = kind is transformers.CLIPVisionModelWithProjection
        self.size: int = model.config.image_size
        self.dim: int = model.config.projection_dim if self._projected else model.config.hidden_size
        self.batch_size = batch_size
        self._mean = torch.tensor(self._settings.get("image_mean", [0.5] * 3)).view(1, 3, 1, 1)
        self._std = torch.tensor(self._settings.get("image_std", [0.5] * 3)).view(1, 3, 1, 1)

    def fingerprint(self) -> str:
        """SHA-256 of the settings and of the weights' names, sizes and first megabyte."""
        digest = hashlib.sha256()
        names = ["config.json", "preprocessor_config.json"]
        names += sorted(p.name for p in self.folder.iterdir() if p.suffix in (".safetensors", ".bin"))
        for name in names:
            with (self.folder / name).open("rb") as file:
                digest.update(f"{name} {os.fstat(file.fileno()).st_size}".encode() + file.read(1 << 20))
        return digest.hexdigest()

    def prepare(self, picture: np.ndarray) -> torch.Tensor:
        """uint8 [h, w, 3] -> uint8 [3, S, S]: resized (shortest side and centre crop, or to the square)."""
        tensor = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]
        size = self._settings.get("size")
        crops = self._settings.get("do_center_crop", False)
        height = width = self.size
        if crops or isinstance(size, int) or "shortest_edge" in (size or {}):
            side = size["shortest_edge"] if isinstance(size, dict) and "shortest_edge" in size else self.size
            scale = max(side, self.size) / min(tensor.shape[2:])
            height, width = (max(self.size, round(n * scale)) for n in tensor.shape[2:])
        mode = _MODES.get(self._settings.get("resample", 3), "bicubic")
        smooth = {} if mode == "nearest" else {"antialias": True}
        tensor = torch.nn.functional.interpolate(tensor, (height, width), mode=mode, **smooth)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return tensor[0, :, top : top + self.size, left : left + self.size]

    @torch.inference_mode()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, S, S] -> float32 [n, d] on the CPU, each of length 1."""
        out = torch.empty(len(pictures), self.dim)
        for i in range(0, len(pictures), self.batch_size):
            pixels = (pictures[i : i + self.batch_size].float() / 255 - self._mean) / self._std
            result = self._model(pixel_values=pixels.to(self.device, self._model.dtype))
            features = result.image_embeds if self._projected else result.pooler_output
            out[i : i + self.batch_size] = torch.nn.functional.normalize(features.float(), dim=-1).cpu()
        return out


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}; give a local CLIP or SigLIP folder"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
