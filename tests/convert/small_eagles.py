"""A small Eagle of language models that are not the demo's, of random weights: checkpoint and export."""

from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

from megatron_eagle.convert.export_files import IMAGE_TOKENS
from megatron_eagle.convert.from_hf import import_hf
from megatron_eagle.convert.to_hf import export_hf
from megatron_eagle.hf_model.prompt import END_THINK, THINK
from tests.convert.hf_folder import rewrite_weights, write_hf_folder

_SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": True}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8448}
_STRETCHED = {"rope_scaling": _YARN, "max_position_embeddings": 33_792}
SMALL_EAGLES = {
    "qwen3 with YaRN": {**_SIZES, "model_type": "qwen3", **_STRETCHED},
    "qwen3_moe": {**_SIZES, "model_type": "qwen3_moe", **_EXPERTS},
}


def write_small_eagle(name: str, folder: Path) -> Path:
    """Below `folder`: `checkpoint`, and its export `hf`, which is returned."""
    source = write_hf_folder(folder / "source", text=SMALL_EAGLES[name])
    rewrite_weights(source, _lively)
    _save_tokenizer(source)
    import_hf(source, folder / "checkpoint")
    export_hf(folder / "checkpoint", folder / "hf")
    return folder / "hf"


def _lively(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Norms about 1, and layers that count for more than the token itself: answers that go on and on."""

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.startswith("language_model."):
            return tensor
        if "norm" in name:
            return 1 + 3 * tensor
        return (tensor - tensor.mean()) * (5 if "_proj.weight" in name or ".gate." in name else 2)

    return {name: changed(name, tensor) for name, tensor in tensors.items()}


def _save_tokenizer(folder: Path) -> None:
    """With Qwen3's tokens of thoughts, in rows that the model has to spare; as transformers 5 saves it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in (THINK, END_THINK)])
    tokenizer.add_special_tokens({"additional_special_tokens": list(IMAGE_TOKENS)})
    tokenizer.save_pretrained(folder)
