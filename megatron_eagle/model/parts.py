"""Which parts of the model train, and how fast: freezing and learning rates for stages 1 and 1.5.

A frozen part has no gradient buffer, no optimizer state and takes no part in gradient communication.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.model.experts import routers
from megatron_eagle.model.flops import PARTS

# Rows of embedding and output layer that the source language model did not have, trained alone while the
# rest of the language model is frozen.
NEW_TOKEN_ROWS = "new_token_rows"
_PREFIXES = {"vision": "vision_model.", "connector": "connector.", "language": "language_model."}
_TOKEN_ROWS = ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight")


def check_parts(
    trainable: Collection[str],
    multipliers: Mapping[str, float],
    first_new_token: int | None,
    freeze_router: bool = False,
) -> None:
    """Check the part names of a configuration.

    Raises:
        UserError: an unknown or missing part, or new token rows whose first id is not given.
    """
    known = (*PARTS, NEW_TOKEN_ROWS)
    for name in (*trainable, *multipliers):
        if name not in known:
            raise UserError(f"optimizer: there is no part {name!r}: choose among {', '.join(known)}")
    if not trainable:
        raise UserError(f"optimizer.trainable is empty: name at least one of {', '.join(known)}")
    for name in multipliers:
        if name not in trainable:
            raise UserError(f"optimizer.lr_multipliers.{name}: this part is frozen (optimizer.trainable)")
    if NEW_TOKEN_ROWS in trainable and "language" in trainable:
        raise UserError(f"optimizer.trainable: {NEW_TOKEN_ROWS} are part of language: name one of them")
    if freeze_router and "language" not in trainable:
        raise UserError(
            "optimizer.freeze_router: the language model is frozen, its routers too: leave it out"
        )
    if (NEW_TOKEN_ROWS in trainable) != (first_new_token is not None):
        raise UserError(
            f"optimizer.first_new_token and {NEW_TOKEN_ROWS} in optimizer.trainable go together: it is the "
            "id of the first token that the language model did not know"
        )


def part_of(name: str, parameter: torch.nn.Parameter) -> str:
    """The part that a parameter of a (wrapped) model belongs to."""
    if hasattr(parameter, "first_trainable_row"):
        return NEW_TOKEN_ROWS
    local = name.removeprefix("module.")
    return next(part for part, prefix in _PREFIXES.items() if local.startswith(prefix))


def freeze(
    models: Iterable[EagleModel],
    trainable: Collection[str],
    first_new_token: int | None,
    freeze_router: bool = False,
) -> None:
    """Leave gradients to the parts in `trainable`, and to the routers of experts among them unless
    `freeze_router`; before the data-parallel wrapper is put on."""
    for model in models:
        for name, parameter in model.named_parameters():
            if NEW_TOKEN_ROWS in trainable and name in _TOKEN_ROWS:
                first = first_new_token - model.mesh.tp.rank * parameter.shape[0]
                parameter.first_trainable_row = min(max(first, 0), parameter.shape[0])
            else:
                parameter.requires_grad_(part_of(name, parameter) in trainable)
        if freeze_router:
            for router in routers(model):
                router.requires_grad_(False)


def mask_old_token_rows(models: Iterable[torch.nn.Module]) -> None:
    """Zero the finished gradients of rows that are not new. Adam then leaves them bit for bit as they are."""
    for model in models:
        parameter: Any
        for parameter in model.parameters():
            if hasattr(parameter, "first_trainable_row"):
                parameter.main_grad[: parameter.first_trainable_row] = 0


def optimizer_overrides(
    multipliers: Mapping[str, float], lr: float, min_lr: float
) -> dict[ParamKey, dict[str, float]]:
    """Megatron's parameter groups: learning rates of parts, and no weight decay for token rows, which
    would shrink the old ones."""

    def belongs(part: str) -> ParamKey:
        return ParamKey(
            with_name_predicate=ParamWithNamePredicate(part, lambda p, name: part_of(name, p) == part)
        )

    overrides: dict[ParamKey, dict[str, float]] = {belongs(NEW_TOKEN_ROWS): {"wd_mult": 0.0}}
    for part, multiplier in multipliers.items():
        settings = overrides.setdefault(belongs(part), {})
        settings |= {"max_lr": lr * multiplier, "min_lr": min_lr * multiplier}
    return overrides
