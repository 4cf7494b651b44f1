"""What a checkpoint may hold beside its weights: tables that its configuration gives, a tied output layer.

Older transformers saved rotary frequencies and position numbers, and some tools write a tied output layer
out. All of it is compared with what it repeats and left out, of an import and of its export.
"""

import torch
from torch import Tensor

from megatron_eagle.convert.pickled import PickledWeights
from megatron_eagle.convert.shards import FREQUENCIES, POSITIONS, HfWeights, read_json
from megatron_eagle.errors import UserError
from megatron_eagle.model.rotary import rotary_frequencies
from megatron_eagle.model.yarn import YarnConfig, read_rope

_HEADS = {
    "language_model.lm_head.weight": "language_model.model.embed_tokens.weight",
    "lm_head.weight": "model.embed_tokens.weight",  # of a language model by itself
}
# Tables may be stored in bf16.
_TOLERANCE = 1e-2


def leave_out_redundant(weights: HfWeights | PickledWeights) -> None:
    """Forget the tensors of a folder that repeat something, if they do.

    Raises:
        UserError: one says something else than the configuration or the embedding.
    """
    file = weights.folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    text = config.get("text_config") or config.get("llm_config") or config
    for name in sorted(weights.shapes):
        repeats = None
        if name.endswith(POSITIONS):
            repeats = "0, 1, 2, ...", _numbers(weights.read(name))
        elif name.endswith(FREQUENCIES):
            theta, scaling = read_rope(text)
            what = f"those of rope_theta {theta:g}" + (" and rope_scaling" if scaling else "")
            repeats = what, _frequencies(weights.read(name), theta, scaling)
        elif name in _HEADS and text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)):
            embedding = weights.read(_HEADS[name]) if _HEADS[name] in weights.shapes else torch.empty(0)
            repeats = "the embedding, which is tied to it", torch.equal(weights.read(name), embedding)
        if repeats is None:
            continue
        if not repeats[1]:
            raise UserError(f"{weights.folder}: {name} is not {repeats[0]}, as config.json says")
        for table in (weights.shapes, weights.dtypes, weights.weight_map):
            del table[name]


def _numbers(found: Tensor) -> bool:
    return torch.equal(found.flatten(), torch.arange(found.numel()))


def _frequencies(found: Tensor, theta: float, scaling: YarnConfig | None) -> bool:
    expected = rotary_frequencies(2 * len(found), theta, scaling)
    return bool(((found.float() / expected - 1).abs() <= _TOLERANCE).all())
