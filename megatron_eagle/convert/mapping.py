"""One table for both directions: names, shapes and layouts of a Hugging Face checkpoint and of the model.

Legend of the shapes: c encoder width, f encoder ffn, i channels, p patch side, n patches; k connector input,
h language-model width, q query features, g key/value features, d head size, m ffn, v vocabulary rows;
e experts, x ffn of an expert.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_eagle.errors import UserError
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.text import TextConfig


@dataclass(frozen=True)
class Layout:
    """How the HF tensors of one rule lie in the model's tensor; `join` and `split` are exact inverses.

    `join` gives the model's tensor as blocks of rows, one below the other: nothing is copied to put them
    together, and a file may hold them apart.
    """

    join: Callable[[list[Tensor], "ModelMapping"], list[Tensor]]
    split: Callable[[Tensor, "ModelMapping"], list[Tensor]]


def _join_groups(parts: list[Tensor], groups: int) -> list[Tensor]:
    """[q rows, ...], [k rows, ...], [v rows, ...] -> per KV group its queries, its key, its value."""
    grouped = [part.reshape(groups, -1, *part.shape[1:]) for part in parts]
    return [torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])]


def _split_groups(tensor: Tensor, groups: int, queries: int) -> list[Tensor]:
    rows = tensor.reshape(groups, queries + 2, -1, *tensor.shape[1:])  # [groups, heads, head dim, ...]
    parts = rows.split((queries, 1, 1), dim=1)
    return [part.reshape(-1, *tensor.shape[1:]) for part in parts]


def _pad_rows(parts: list[Tensor], plan: "ModelMapping") -> list[Tensor]:
    """Zeros for the padding rows: no id refers to them, the loss gives them no probability, and so their
    gradient is zero and they stay zero."""
    missing = plan.config.text.padded_vocab_size - len(parts[0])
    padding = [parts[0].new_zeros(missing, *parts[0].shape[1:])] if missing else []
    return parts + padding


SAME = Layout(lambda parts, _: parts, lambda tensor, _: [tensor])
# Gate rows above up rows.
STACKED = Layout(lambda parts, _: parts, lambda tensor, _: list(tensor.chunk(2)))
# Grouped queries: Megatron keeps the query heads of a KV head beside it, so that both are split together.
LANGUAGE_QKV = Layout(
    lambda parts, plan: _join_groups(parts, plan.config.text.num_key_value_heads),
    lambda tensor, plan: _split_groups(
        tensor,
        plan.config.text.num_key_value_heads,
        plan.config.text.num_attention_heads // plan.config.text.num_key_value_heads,
    ),
)
# In the vision encoder every head is its own group.
VISION_QKV = Layout(
    lambda parts, plan: _join_groups(parts, plan.config.vision.num_attention_heads),
    lambda tensor, plan: _split_groups(tensor, plan.config.vision.num_attention_heads, 1),
)
VOCABULARY = Layout(_pad_rows, lambda tensor, plan: [tensor[: plan.config.text.vocab_size]])

_V = "vision_model.vision_model."
_VL = _V + "encoder.layers.{}."
_L = "language_model.model."
_LL = _L + "layers.{}."
_MV = "vision_model.encoder.layers.{}."
_ML = "language_model.decoder.layers.{}."


def _qkv(prefix: str, kind: str) -> list[str]:
    return [f"{prefix}self_attn.{x}_proj.{kind}" for x in "qkv"]


# (model name, HF names, HF shapes, layout); `{}` is the layer, `{e}` the expert, counted over all ranks:
# sequential and grouped experts have the same names here. Vision, connector, language model.
Row = tuple[str, list[str], list[str], Layout]
TABLE: list[Row] = [
    ("vision_model.patch_embedding.weight", [_V + "embeddings.patch_embedding.weight"], ["c i p p"], SAME),
    ("vision_model.patch_embedding.bias", [_V + "embeddings.patch_embedding.bias"], ["c"], SAME),
    ("vision_model.position_embedding.weight", [_V + "embeddings.position_embedding.weight"], ["n c"], SAME),
    (_MV + "input_layernorm.weight", [_VL + "layer_norm1.weight"], ["c"], SAME),
    (_MV + "input_layernorm.bias", [_VL + "layer_norm1.bias"], ["c"], SAME),
    (_MV + "self_attention.linear_qkv.weight", _qkv(_VL, "weight"), ["c c"] * 3, VISION_QKV),
    (_MV + "self_attention.linear_qkv.bias", _qkv(_VL, "bias"), ["c"] * 3, VISION_QKV),
    (_MV + "self_attention.linear_proj.weight", [_VL + "self_attn.out_proj.weight"], ["c c"], SAME),
    (_MV + "self_attention.linear_proj.bias", [_VL + "self_attn.out_proj.bias"], ["c"], SAME),
    (_MV + "pre_mlp_layernorm.weight", [_VL + "layer_norm2.weight"], ["c"], SAME),
    (_MV + "pre_mlp_layernorm.bias", [_VL + "layer_norm2.bias"], ["c"], SAME),
    (_MV + "mlp.linear_fc1.weight", [_VL + "mlp.fc1.weight"], ["f c"], SAME),
    (_MV + "mlp.linear_fc1.bias", [_VL + "mlp.fc1.bias"], ["f"], SAME),
    (_MV + "mlp.linear_fc2.weight", [_VL + "mlp.fc2.weight"], ["c f"], SAME),
    (_MV + "mlp.linear_fc2.bias", [_VL + "mlp.fc2.bias"], ["c"], SAME),
    ("vision_model.encoder.final_layernorm.weight", [_V + "post_layernorm.weight"], ["c"], SAME),
    ("vision_model.encoder.final_layernorm.bias", [_V + "post_layernorm.bias"], ["c"], SAME),
    ("connector.layer_norm.weight", ["mlp1.0.weight"], ["k"], SAME),
    ("connector.layer_norm.bias", ["mlp1.0.bias"], ["k"], SAME),
    ("connector.linear_fc1.weight", ["mlp1.1.weight"], ["h k"], SAME),
    ("connector.linear_fc1.bias", ["mlp1.1.bias"], ["h"], SAME),
    ("connector.linear_fc2.weight", ["mlp1.3.weight"], ["h h"], SAME),
    ("connector.linear_fc2.bias", ["mlp1.3.bias"], ["h"], SAME),
    ("language_model.embedding.word_embeddings.weight", [_L + "embed_tokens.weight"], ["v h"], VOCABULARY),
    (_ML + "input_layernorm.weight", [_LL + "input_layernorm.weight"], ["h"], SAME),
    (_ML + "self_attention.linear_qkv.weight", _qkv(_LL, "weight"), ["q h", "g h", "g h"], LANGUAGE_QKV),
    (_ML + "self_attention.linear_qkv.bias", _qkv(_LL, "bias"), ["q", "g", "g"], LANGUAGE_QKV),
    (_ML + "self_attention.q_layernorm.weight", [_LL + "self_attn.q_norm.weight"], ["d"], SAME),
    (_ML + "self_attention.k_layernorm.weight", [_LL + "self_attn.k_norm.weight"], ["d"], SAME),
    (_ML + "self_attention.linear_proj.weight", [_LL + "self_attn.o_proj.weight"], ["h q"], SAME),
    (_ML + "pre_mlp_layernorm.weight", [_LL + "post_attention_layernorm.weight"], ["h"], SAME),
    (
        _ML + "mlp.linear_fc1.weight",
        [_LL + "mlp.gate_proj.weight", _LL + "mlp.up_proj.weight"],
        ["m h", "m h"],
        STACKED,
    ),
    (_ML + "mlp.linear_fc2.weight", [_LL + "mlp.down_proj.weight"], ["h m"], SAME),
    (_ML + "mlp.router.weight", [_LL + "mlp.gate.weight"], ["e h"], SAME),
    (
        _ML + "mlp.experts.{e}.linear_fc1.weight",
        [_LL + "mlp.experts.{e}.gate_proj.weight", _LL + "mlp.experts.{e}.up_proj.weight"],
        ["x h", "x h"],
        STACKED,
    ),
    (
        _ML + "mlp.experts.{e}.linear_fc2.weight",
        [_LL + "mlp.experts.{e}.down_proj.weight"],
        ["h x"],
        SAME,
    ),
    ("language_model.decoder.final_layernorm.weight", [_L + "norm.weight"], ["h"], SAME),
    ("language_model.output_layer.weight", ["language_model.lm_head.weight"], ["v h"], VOCABULARY),
]

# The encoder's pooling head: in the checkpoint, not in the model. It passes through conversions untouched.
PASSED_THROUGH: list[tuple[str, str]] = [
    (_V + "head.probe", "1 1 c"),
    (_V + "head.attention.in_proj_weight", "3c c"),
    (_V + "head.attention.in_proj_bias", "3c"),
    (_V + "head.attention.out_proj.weight", "c c"),
    (_V + "head.attention.out_proj.bias", "c"),
    (_V + "head.layernorm.weight", "c"),
    (_V + "head.layernorm.bias", "c"),
    (_V + "head.mlp.fc1.weight", "f c"),
    (_V + "head.mlp.fc1.bias", "f"),
    (_V + "head.mlp.fc2.weight", "c f"),
    (_V + "head.mlp.fc2.bias", "c"),
]


@dataclass(frozen=True)
class MappedTensor:
    """One tensor of the model and the HF tensors it consists of (names and shapes, in the layout's order)."""

    model: str
    hf: dict[str, tuple[int, ...]]
    layout: Layout


class ModelMapping:
    """The table written out for one model: every tensor by its full name, with its shape.

    `has_head` says whether the HF checkpoint has the vision encoder's pooling head.
    """

    config: EagleConfig

    def __init__(self, config: EagleConfig, *, has_head: bool) -> None:
        self.config = config
        vision, text = config.vision, config.text
        self._sizes = {
            "c": vision.hidden_size,
            "3c": 3 * vision.hidden_size,
            "f": vision.intermediate_size,
            "i": vision.num_channels,
            "p": vision.patch_size,
            "n": vision.num_patches,
            "k": vision.hidden_size * config.shuffle_factor**2,
            "h": text.hidden_size,
            "q": text.head_dim * text.num_attention_heads,
            "g": text.head_dim * text.num_key_value_heads,
            "d": text.head_dim,
            "m": text.intermediate_size,
            "v": text.vocab_size,
            "1": 1,
        }
        if text.experts is not None:
            self._sizes |= {"e": text.experts.num_experts, "x": text.experts.moe_intermediate_size}
        self.entries = list(self._written_out())
        self.passed_through = {name: self._shape(shape) for name, shape in PASSED_THROUGH} if has_head else {}
        self.hf_shapes = {name: shape for entry in self.entries for name, shape in entry.hf.items()}
        self.hf_shapes |= self.passed_through

    def _shape(self, letters: str) -> tuple[int, ...]:
        return tuple(self._sizes[letter] for letter in letters.split())

    def _written_out(self) -> Iterator[MappedTensor]:
        text = self.config.text
        absent = _absent(text)
        for model, names, shapes, layout in TABLE:
            if model in absent:
                continue
            layers = experts = 1
            if "{}" in model:
                encoder = model.startswith("vision_model.")
                layers = (self.config.vision if encoder else text).num_hidden_layers
            if "{e}" in model and text.experts is not None:
                experts = text.experts.num_experts
            for layer, e in itertools.product(range(layers), range(experts)):
                hf = {n.format(layer, e=e): self._shape(s) for n, s in zip(names, shapes, strict=True)}
                yield MappedTensor(model.format(layer, e=e), hf, layout)

    def check_hf(self, found: Mapping[str, tuple[int, ...]], where: str) -> None:
        """Check the names and shapes of an HF checkpoint.

        Raises:
            UserError: tensors are missing, unexpected or have another shape; all kinds are named.
        """
        problems = []
        missing = self.hf_shapes.keys() - found.keys()
        unexpected = found.keys() - self.hf_shapes.keys()
        wrong = [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in self.hf_shapes.items()
            if name in found and tuple(found[name]) != shape
        ]
        if missing:
            problems.append(f"missing {_listed(missing)}")
        if unexpected:
            problems.append(f"unexpected {_listed(unexpected)}")
        if any(name.endswith(".mlp.experts.gate_up_proj") for name in unexpected):
            problems.append(
                "its experts are stacked, as transformers 5 has them in memory: write the folder again with "
                "its save_pretrained, without save_original_format=False"
            )
        if wrong:
            problems.append(f"of another shape {_listed(wrong)}")
        if problems:
            raise UserError(f"{where}: its tensors do not fit its config.json: {'; '.join(problems)}")

    def blocks(self, entry: MappedTensor, read: Callable[[str], Tensor]) -> list[Tensor]:
        """One tensor of the model, as blocks of its rows, from a reader of HF tensors."""
        return entry.layout.join([read(name) for name in entry.hf], self)

    def block_shapes(self, entry: MappedTensor) -> list[tuple[int, ...]]:
        """Shapes of `blocks`, without values."""
        empty = [torch.empty(shape, device="meta") for shape in entry.hf.values()]
        return [tuple(block.shape) for block in entry.layout.join(empty, self)]

    def to_hf(
        self, read: Callable[[str], Tensor], names: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The HF tensors of the model (not those that pass through) from a reader of the model's tensors.

        `names`: these alone (None: all); what none of them is made of is not read.
        """
        for entry in self.entries:
            if names is not None and not any(name in names for name in entry.hf):
                continue
            for name, tensor in zip(entry.hf, entry.layout.split(read(entry.model), self), strict=True):
                if names is None or name in names:
                    yield name, tensor


def _absent(text: TextConfig) -> set[str]:
    """Rows of the table that this language model has not."""
    absent = set()
    if text.tie_word_embeddings:
        absent.add("language_model.output_layer.weight")  # the embedding, once more
    if not text.family.qkv_bias:
        absent.add(_ML + "self_attention.linear_qkv.bias")
    if not text.family.qk_norm:
        absent |= {_ML + f"self_attention.{x}_layernorm.weight" for x in "qk"}
    experts = {name for name, *_ in TABLE if "mlp.router" in name or "{e}" in name}
    absent |= experts if text.experts is None else {_ML + f"mlp.linear_fc{n}.weight" for n in (1, 2)}
    return absent


def _listed(names: Collection[str], limit: int = 12) -> str:
    def natural(name: str) -> list[Any]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

    names = sorted(names, key=natural)
    rest = len(names) - limit
    return f"({len(names)}) " + ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
