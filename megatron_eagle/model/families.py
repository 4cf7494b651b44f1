"""The language models that can stand behind the connector, one description each.

Everything that differs between them is said here and nowhere else: configurations, layers, weights' names,
templates and exports ask the description, never the name.
"""

from dataclasses import dataclass

from megatron_eagle.errors import UserError


@dataclass(frozen=True)
class Family:
    """A language model of RMSNorm, rotary positions, grouped queries and SwiGLU.

    Attributes:
        name: for people.
        model_type: transformers' name of its configuration.
        architecture: transformers' and vLLM's name of the model.
        qkv_bias: queries, keys and values have a bias.
        qk_norm: each head of queries and of keys is normed before it is rotated.
        own_head_dim: the head size is free; otherwise it is hidden_size / num_attention_heads.
        hf_head_dim: head size of a configuration that says none; None: hidden_size / num_attention_heads.
        experts: every layer's MLP is a mixture of experts.
    """

    name: str
    model_type: str
    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    own_head_dim: bool = False
    hf_head_dim: int | None = None
    experts: bool = False


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("Qwen2.5", "qwen2", "Qwen2ForCausalLM", qkv_bias=True),
        Family("Qwen3", "qwen3", "Qwen3ForCausalLM", qk_norm=True, own_head_dim=True, hf_head_dim=128),
        Family(
            "Qwen3 MoE", "qwen3_moe", "Qwen3MoeForCausalLM", qk_norm=True, own_head_dim=True, experts=True
        ),
    )
}


def family_of(model_type: object, where: str) -> Family:
    """The description of a `model_type`.

    Raises:
        UserError: there is none; those that there are are named.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UserError(f"{where} is {model_type!r}: the language model must be one of {', '.join(FAMILIES)}")
    return family
