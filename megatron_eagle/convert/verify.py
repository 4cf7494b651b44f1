"""Does a checkpoint compute what a Hugging Face folder computes? The same logits on prompts with media.

Our Megatron model reads the checkpoint, transformers reads the folder; both in fp32, one after the other.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_eagle.checkpoint import read_model_config
from megatron_eagle.convert.checkpoint_forward import many_logits
from megatron_eagle.convert.export_files import write_config, write_processor
from megatron_eagle.convert.hf_metadata import HfMetadata
from megatron_eagle.errors import UserError


@dataclass(frozen=True)
class Agreement:
    """How far two models' logits are apart on one prompt of `tokens` tokens and `tiles` tiles."""

    prompt: str
    tokens: int
    tiles: int
    max_abs: float  # largest difference of two logits
    relative: float  # that over the largest logit
    same_choice: float  # share of positions at which both models prefer the same next token


def default_prompts() -> dict[str, list[dict[str, Any]]]:
    """Name -> content of a user's turn: text, a picture, two pictures, a clip. The media are drawn here."""
    wide, tall = _drawing(640, 480), _drawing(300, 900)
    frames = [_drawing(320, 240, shift) for shift in range(0, 160, 40)]
    return {
        "text": [_text("Name three colours of the rainbow.")],
        "picture": [{"type": "image", "image": wide}, _text("What does the picture show?")],
        "two pictures": [
            {"type": "image", "image": wide},
            {"type": "image", "image": tall},
            _text("What is different between them?"),
        ],
        "video": [{"type": "video", "video": frames, "fps": 2}, _text("Which way does it move?")],
    }


def user_prompt(prompt: str, images: Sequence[str], videos: Sequence[str]) -> list[dict[str, Any]]:
    """Content of a user's turn with files."""
    media = [{"type": "image", "image": path} for path in images]
    return [*media, *({"type": "video", "video": path} for path in videos), _text(prompt)]


def compare_logits(
    hf: str | Path, checkpoint: str | Path, prompts: dict[str, list[dict[str, Any]]]
) -> list[Agreement]:
    """Logits of the folder `hf` and of the latest weights in `checkpoint` on every prompt.

    Raises:
        UserError: the checkpoint carries no tokenizer, or a picture or video cannot be read.
    """
    inputs = _inputs(Path(checkpoint), prompts)
    theirs = _hf_logits(Path(hf), inputs)
    rows = []
    ours = many_logits(checkpoint, inputs, allow_long_prompts=True)
    for name, (ids, pixels), expected, found in zip(prompts, inputs, theirs, ours, strict=True):
        apart = float((found - expected).abs().max())
        agree = (found.argmax(-1) == expected.argmax(-1)).float().mean()
        tiles = 0 if pixels is None else len(pixels)
        relative = apart / float(expected.abs().max())
        rows.append(Agreement(name, ids.shape[1], tiles, apart, relative, float(agree)))
    return rows


def _inputs(checkpoint: Path, prompts: dict[str, list[dict[str, Any]]]) -> list[tuple[Tensor, Tensor | None]]:
    from transformers import AutoProcessor

    metadata, config = HfMetadata(checkpoint), read_model_config(checkpoint)
    if not metadata.tokenizer_files:
        raise UserError(f"{metadata.folder}: no tokenizer, so prompts cannot be made; use --tensors-only")
    result = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder, config, metadata, {}, has_head=False)
        write_processor(folder, config, metadata, None)
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, local_files_only=True)
        for content in prompts.values():
            messages = [{"role": "user", "content": content}]
            try:
                text = processor.apply_chat_template(messages, add_generation_prompt=True)
                images, videos = processor.process_vision_info(messages)
                data = processor(text=[text], images=images, videos=videos, return_tensors="pt")
            except ValueError as error:  # the processor's own messages name the file or the placeholder
                raise UserError(str(error)) from None
            result.append((data["input_ids"], data.get("pixel_values")))
    return result


@torch.no_grad()
def _hf_logits(folder: Path, inputs: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    from megatron_eagle.hf_model.modeling_eagle2_5_vl import Eagle2_5_VLForConditionalGeneration

    loaded: Any = Eagle2_5_VLForConditionalGeneration.from_pretrained(
        str(folder), torch_dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    model, report = loaded
    wrong = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind]]
    if wrong:
        raise UserError(f"{folder}: transformers left tensors at random values: {', '.join(wrong[:4])}")
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    device = model.device
    return [
        model(input_ids=ids.to(device), pixel_values=None if pixels is None else pixels.to(device))
        .logits.float()
        .cpu()
        for ids, pixels in inputs
    ]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _drawing(width: int, height: int, shift: int = 0) -> Image.Image:
    """Two gradients, stripes and a disc that `shift` pixels move."""
    y, x = np.mgrid[:height, :width]
    red, green, blue = 255 * x / width, 255 * y / height, 127 + 127 * np.sin((x + 2 * y) / 9)
    pixels = np.stack([red, green, blue], -1)
    pixels[(x - width / 3 - shift) ** 2 + (y - height / 2) ** 2 < (height / 6) ** 2] = (250, 240, 20)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
