"""YaRN (arXiv 2309.00071): rotary positions stretched beyond those of the pretraining.

Fast channels keep their angles, slow ones turn `factor` times slower, those between lie on a ramp; cosines
and sines are multiplied by the attention factor. What is computed from it: `eagle_kernels.rope`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from megatron_eagle.config import from_dict, to_dict
from megatron_eagle.errors import UserError
from megatron_eagle.model.hf_config import require
from megatron_eagle.ranges import Range, Ranged


@dataclass
class YarnConfig(Ranged):
    """YaRN in transformers' words; what is left out has transformers' defaults.

    The model then reaches `factor` times `original_max_position_embeddings` tokens, and that is its
    `max_position_embeddings`.
    """

    factor: Annotated[float, Range(1, 1000)]  # of the length
    original_max_position_embeddings: Annotated[int, Range(1, 2**21)]  # tokens
    rope_type: Literal["yarn"] = "yarn"  # no other kind
    # What cosines and sines are multiplied by; null: 0.1 ln(factor) + 1.
    attention_factor: Annotated[float, Range(1e-3, 1e3)] | None = None
    # Channels that turn so often within the original length, or oftener, keep their angles.
    beta_fast: Annotated[float, Range(1e-3, 1e6)] = 32.0
    # Channels that turn so often, or less, are slowed down by all of the factor.
    beta_slow: Annotated[float, Range(1e-3, 1e6)] = 1.0
    truncate: bool = True  # the ramp between them begins and ends at whole channels

    @property
    def reach(self) -> int:
        """Tokens of the longest prompt."""
        return round(self.factor * self.original_max_position_embeddings)

    @property
    def amplitude(self) -> float:
        """The attention factor."""
        return _amplitude(self.factor) if self.attention_factor is None else self.attention_factor

    def to_hf(self) -> dict[str, Any]:
        """As transformers and vLLM read it; what has transformers' default is left out."""
        least = to_dict(YarnConfig(self.factor, self.original_max_position_embeddings))
        needed = ("factor", "original_max_position_embeddings", "rope_type")
        own = {name: value for name, value in to_dict(self).items() if name in needed or value != least[name]}
        if self.attention_factor is not None:  # vLLM's word, which it multiplies by the default
            own["attn_factor"] = self.attention_factor / _amplitude(self.factor)
        return own


def read_rope(hf: Mapping[str, Any]) -> tuple[float, YarnConfig | None]:
    """Theta and YaRN of a configuration, in the spellings of transformers 4 (`rope_scaling`) and 5
    (`rope_parameters`).

    Raises:
        UserError: another kind of scaling, one that lacks a number, or two that contradict each other.
    """
    names = "rope_parameters", "rope_scaling"
    for name in names:
        if not isinstance(hf.get(name) or {}, Mapping):
            raise UserError(f"config.json: {name} is {hf[name]!r}: a dictionary of settings is needed")
    new, old = (dict(hf.get(name) or {}) for name in names)
    for said in (new, old):
        kind = said.pop("type", None)
        said.setdefault("rope_type", kind or "default")
    theta = new.pop("rope_theta", old.pop("rope_theta", hf.get("rope_theta", 1e4)))  # transformers' default
    if hf.get("rope_theta", theta) != theta:
        raise UserError(
            f"config.json: rope_theta is {hf['rope_theta']} and rope_parameters.rope_theta {theta}; "
            "leave the wrong one out"
        )
    if hf.get("rope_parameters") and hf.get("rope_scaling"):
        old.pop("rope_theta", None)
        if old != new:
            raise UserError(
                f"config.json: rope_scaling is {hf['rope_scaling']} and rope_parameters "
                f"{hf['rope_parameters']}; leave the wrong one out"
            )
    scaling = old if hf.get("rope_scaling") else new
    require({**hf, **scaling}, partial_rotary_factor=1.0)
    kind = scaling["rope_type"]
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise UserError(f"config.json: rope_scaling is of rope_type {kind!r}; only 'yarn' is supported")
    return theta, _read_yarn(scaling, hf)


def _read_yarn(scaling: dict[str, Any], hf: Mapping[str, Any]) -> YarnConfig:
    own = {name: value for name, value in scaling.items() if value is not None}
    own.pop("partial_rotary_factor", None)
    own.pop("attn_factor", None)  # what vLLM reads of an attention factor that stands beside it
    original = "original_max_position_embeddings"
    own.setdefault(original, hf.get(original, hf.get("max_position_embeddings", 32768)))
    if hf.get(original, own[original]) != own[original]:  # transformers 5 takes this one, 4 the other
        raise UserError(
            f"config.json: {original} is {hf[original]} beside rope_scaling and {own[original]} in it; leave "
            "the wrong one out"
        )
    scales = own.pop("mscale", None), own.pop("mscale_all_dim", None)
    if all(scales) and "attention_factor" not in own and "factor" in own:
        one, all_dim = (_amplitude(own["factor"], scale) for scale in scales if scale)
        own["attention_factor"] = one / all_dim
    return from_dict(YarnConfig, own, "config.json: rope_scaling")


def _amplitude(factor: float, scale: float = 1) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
