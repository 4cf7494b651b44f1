"""A small Eagle of each language model that is not the demo's, of random weights: its checkpoint and export.

Sizes are those that vLLM's kernels for a CPU take: heads of 32 channels, experts on a width that 32 divides.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from megatron_eagle.convert.export_files import IMAGE_TOKENS
from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.hf_model.prompt import END_THINK, THINK
from tests.convert.hf_folder import rewrite_weights, write_hf_folder

# Both reach beyond the 32,768 tokens that a certificate asks for; 4.3 x 7,659 are 32,933.7, rounded up.
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8448}
_ROUNDED = {"rope_type": "yarn", "factor": 4.3, "original_max_position_embeddings": 7659}
REACH, ROUNDED_REACH = 33_792, 32_934
_HEADS = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_QWEN3 = {**_HEADS, "head_dim": 32}
_MOE = {**_QWEN3, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 3}


@dataclass(frozen=True)
class SmallEagle:
    """Its language model, and what tells it apart.

    Attributes:
        text: its settings, as transformers takes them.
        other: settings with which it is another model, and
        ones: the weights that are 1 in that one.
        length: tokens that it takes.
        rounded: that is more than YaRN's factor times its original length: transformers 4.51 divides the one
            by the other, for another factor.
    """

    text: dict[str, Any]
    other: dict[str, Any] = field(default_factory=dict)
    ones: tuple[str, ...] = ()
    length: int = 4096
    rounded: bool = False


def _rounded_yarn(**settings: float) -> dict[str, Any]:
    return {"rope_scaling": {**_ROUNDED, **settings}, "max_position_embeddings": ROUNDED_REACH}


SMALL_EAGLES = {
    "qwen3, tied": SmallEagle(
        {**_QWEN3, "model_type": "qwen3", "tie_word_embeddings": True}, ones=("q_norm", "k_norm")
    ),
    "qwen3 with YaRN": SmallEagle(
        {**_QWEN3, "model_type": "qwen3", "rope_scaling": _YARN, "max_position_embeddings": REACH},
        {"rope_scaling": None},
        length=REACH,
    ),
    "qwen2 with YaRN and an attention factor": SmallEagle(
        {**_HEADS, "num_attention_heads": 2, **_rounded_yarn(attention_factor=1.3)},
        _rounded_yarn(),
        length=ROUNDED_REACH,
        rounded=True,
    ),
    # Experts of a width that vLLM fills up with zeros, and of one that it takes as it is.
    "qwen3_moe": SmallEagle(
        {**_MOE, "moe_intermediate_size": 48, "norm_topk_prob": True}, {"norm_topk_prob": False}
    ),
    "qwen3_moe, probabilities as they are": SmallEagle(
        {**_MOE, "moe_intermediate_size": 64, "norm_topk_prob": False}, {"norm_topk_prob": True}
    ),
}


def write_small_eagle(name: str, folder: Path) -> Path:
    """Below `folder`: `checkpoint`, and its export `hf`, which is returned."""
    source = write_hf_folder(folder / "source", text=SMALL_EAGLES[name].text)
    rewrite_weights(source, _lively)
    if SMALL_EAGLES[name].text.get("model_type"):
        _think(source)
    import_hf(source, folder / "checkpoint")
    export_hf(folder / "checkpoint", folder / "hf")
    return folder / "hf"


def _lively(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norms about 1, and layers that count for more than the token itself: answers that go on and on.

    Not queries and keys: where they have no norms, scores that are far apart make fp32 itself err by 3e-4.
    """

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.startswith("language_model."):
            return tensor
        if "norm" in name:
            return 1 + 3 * tensor
        more = ("v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", ".gate")
        return (tensor - tensor.mean()) * (5 if any(f"{part}.weight" in name for part in more) else 2)

    return {name: changed(name, tensor) for name, tensor in tensors.items()}


def _think(folder: Path) -> None:
    """The two tokens of Qwen3, in rows that the model has to spare, as transformers 5 saves a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in (THINK, END_THINK)])
    tokenizer.add_special_tokens({"additional_special_tokens": list(IMAGE_TOKENS)})
    tokenizer.save_pretrained(folder)


def write_other(name: str, hf: Path, folder: Path) -> Path:
    """The export `hf` with what makes it another model."""
    family = SMALL_EAGLES[name]
    folder.mkdir()
    for file in hf.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (folder / file.name).symlink_to(file)
    (folder / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes())
    rewrite_weights(
        folder,
        lambda tensors: {
            k: torch.ones_like(v) if any(part in k for part in family.ones) else v for k, v in tensors.items()
        },
    )
    config = json.loads((hf / "config.json").read_text())
    text = config["text_config"]
    text.update(family.other)
    if "rope_scaling" in family.other:
        text["rope_parameters"] = {"rope_theta": text["rope_theta"], **(family.other["rope_scaling"] or {})}
        text["rope_parameters"].setdefault("rope_type", "default")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
