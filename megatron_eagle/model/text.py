"""The language model's sizes, in Hugging Face's words: in a run's file, in a run, and in a `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from megatron_eagle.config import from_dict, to_dict
from megatron_eagle.errors import UserError
from megatron_eagle.model.families import FAMILIES, Family, family_of
from megatron_eagle.model.hf_config import known_fields, missing_keys_named, require
from megatron_eagle.model.yarn import YarnConfig, read_rope
from megatron_eagle.ranges import Range, Ranged

# Vocabulary rows are padded to this multiple for every tensor parallel size up to 4, so that a rank's
# share stays a multiple of 128 and a checkpoint has one shape whatever the layout.
VOCAB_MULTIPLE = 512


@dataclass
class ExpertsConfig(Ranged):
    """The mixture of experts that every layer of the family qwen3_moe has in place of an MLP."""

    num_experts: Annotated[int, Range(1, 65536)]  # of a layer
    num_experts_per_tok: Annotated[int, Range(1, 1024)]  # that the router chooses for a token
    moe_intermediate_size: Annotated[int, Range(8, 262144)]  # of an expert's MLP
    norm_topk_prob: bool = False  # the chosen experts' probabilities are divided by their sum
    # Weight of the auxiliary loss, which keeps experts equally busy; 0: none.
    router_aux_loss_coef: Annotated[float, Range(0, 10)] = 0.001


@dataclass
class TextSection(Ranged):
    """A run file's word on the language model. `vocab_size: null` is taken from the data's manifest."""

    model_type: Literal["qwen2", "qwen3", "qwen3_moe"] = "qwen2"  # the family (model/families.py)
    hidden_size: Annotated[int, Range(8, 65536)] = 64  # features of a token
    intermediate_size: Annotated[int, Range(8, 262144)] = 160  # of the MLP
    num_hidden_layers: Annotated[int, Range(1, 1024)] = 4  # depth of the language model
    num_attention_heads: Annotated[int, Range(1, 1024)] = 4  # of queries
    num_key_value_heads: Annotated[int, Range(1, 1024)] = 2  # each serves equally many query heads
    # Channels of a head; null: hidden_size / num_attention_heads, as always in qwen2.
    head_dim: Annotated[int, Range(1, 65536)] | None = None
    vocab_size: Annotated[int, Range(1, 2**24)] | None = None
    rope_theta: Annotated[float, Range(1, 1e12)] = 1e6  # base of the rotary positions
    rope_scaling: YarnConfig | None = None  # rotary positions beyond those of the pretraining
    rms_norm_eps: Annotated[float, Range(1e-12, 0.1)] = 1e-6  # of every norm
    tie_word_embeddings: bool = False  # the output layer is the embedding
    # Tokens of a prompt that the model is made for; a run raises it to its packs (training/run_config.py).
    max_position_embeddings: Annotated[int, Range(1, 2**31 - 1)] = 32768
    experts: ExpertsConfig | None = None  # of the family qwen3_moe

    @property
    def family(self) -> Family:
        """What kind of language model it is."""
        return FAMILIES[self.model_type]

    def validate(self) -> None:
        """Check sizes against each other and against the family.

        Raises:
            UserError: naming the rule and the values.
        """
        heads, family = self.num_attention_heads, self.family
        multiples = [("num_attention_heads", heads, "num_key_value_heads", self.num_key_value_heads)]
        if self.head_dim is None or not family.own_head_dim:
            multiples.append(("hidden_size", self.hidden_size, "num_attention_heads", heads))
        width = self.hidden_size // heads
        size = width if self.head_dim is None else self.head_dim
        multiples.append(("head_dim", size, "a rotary pair", 2))
        for name, value, divisor_name, divisor in multiples:
            if value % divisor:
                raise UserError(
                    f"model.text.{name} is {value}: must be a multiple of {divisor} ({divisor_name})"
                )
        if size != width and not family.own_head_dim:
            raise UserError(
                f"model.text.head_dim is {size}: in {self.model_type} it is {width}, hidden_size / "
                "num_attention_heads; set it to null"
            )
        self._validate_experts()
        scaling = self.rope_scaling
        if scaling is not None and self.rope_theta <= 1:
            raise UserError("model.text.rope_theta is 1: rope_scaling needs a larger one")
        if scaling is not None and self.max_position_embeddings > scaling.reach:
            raise UserError(
                f"model.text.max_position_embeddings is {self.max_position_embeddings}: rope_scaling reaches "
                f"{scaling.reach}, its factor {scaling.factor:g} times "
                f"{scaling.original_max_position_embeddings}; raise the factor, or ask for fewer positions"
            )

    def _validate_experts(self) -> None:
        experts = self.experts
        if self.family.experts != (experts is not None):
            kind = "needs" if self.family.experts else "has no"
            raise UserError(f"model.text.experts: the family {self.model_type} {kind} experts")
        if experts is not None and experts.num_experts_per_tok > experts.num_experts:
            raise UserError(
                f"model.text.experts.num_experts_per_tok is {experts.num_experts_per_tok}: there are "
                f"{experts.num_experts} experts"
            )


@dataclass
class TextConfig(TextSection):
    """The language model of a run: its vocabulary and its head size are known."""

    vocab_size: Annotated[int, Range(1, 2**24)] = field(kw_only=True)
    head_dim: Annotated[int, Range(1, 65536)] = None  # type: ignore[assignment]  # settled below

    def __post_init__(self) -> None:
        if self.head_dim is None:
            self.head_dim = max(1, self.hidden_size // self.num_attention_heads)
        if self.rope_scaling is not None:
            self.max_position_embeddings = max(self.max_position_embeddings, self.rope_scaling.reach)
        super().__post_init__()

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "TextConfig":
        """From the configuration of a language model of one of the families.

        Raises:
            UserError: another architecture, or a missing key.
        """
        with missing_keys_named():
            family = family_of(hf.get("model_type", "qwen2"), "config.json: model_type")
            kinds = sorted(set(hf.get("layer_types") or ["full_attention"]))
            require(hf, hidden_act="silu", use_sliding_window=False)
            require({"layer_types": kinds}, layer_types=["full_attention"])
            if not family.qkv_bias:
                require(hf, attention_bias=False)
            own = known_fields(cls, hf, ("model_type", "head_dim", "rope_theta", "rope_scaling", "experts"))
            theta, scaling = read_rope(hf)
            own |= {"model_type": family.model_type, "rope_theta": theta, "rope_scaling": to_dict(scaling)}
            if family.experts:
                own["experts"] = _read_experts(hf)
            size = hf.get("head_dim") or family.hf_head_dim
            if size is not None:
                own["head_dim"] = size
            text = from_dict(cls, own, "config.json: text_config")
        width = text.hidden_size // text.num_attention_heads
        if not family.own_head_dim:
            require({"head_dim": text.head_dim}, head_dim=width)
        return text

    def to_hf(self) -> dict[str, Any]:
        """Contents of `text_config`: for transformers 5 and for what reads the words of 4."""
        family, scaling = self.family, self.rope_scaling
        nested = ("model_type", "head_dim", "rope_scaling", "experts")
        rope: dict[str, Any] = {"rope_type": "default"} if scaling is None else scaling.to_hf()
        own: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name not in nested},
            # Beside rope_theta, over which it wins in transformers 5: a source's own must not stay.
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "rope_scaling": None if scaling is None else rope,
        }
        if family.own_head_dim:
            own["head_dim"] = self.head_dim
        if not family.qkv_bias:
            own["attention_bias"] = False
        if self.experts is not None:
            own |= {**to_dict(self.experts), "decoder_sparse_step": 1, "mlp_only_layers": []}
        return own

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the output layer inside Megatron (`VOCAB_MULTIPLE`)."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def _read_experts(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The section `experts` of a configuration whose every layer has them, and no others beside them."""
    require(hf, decoder_sparse_step=1)
    require({"mlp_only_layers": list(hf.get("mlp_only_layers") or [])}, mlp_only_layers=[])
    shared = ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts")
    for name in shared:
        require({name: hf.get(name) or 0}, **{name: 0})
    own = {name: hf[name] for name in ("num_experts_per_tok", "moe_intermediate_size")}
    # transformers 5 saves it under the second name.
    own["num_experts"] = hf["num_experts" if "num_experts" in hf else "num_local_experts"]
    defaults = ("norm_topk_prob", "router_aux_loss_coef")
    return own | {name: hf[name] for name in defaults if name in hf}
