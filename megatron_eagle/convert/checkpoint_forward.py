"""One forward pass of a training checkpoint in this process, for scripts that compare models."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_eagle.checkpoint import load_checkpoint, read_lora_config, read_model_config
from megatron_eagle.convert.whole_model import whole_model
from megatron_eagle.errors import UserError
from megatron_eagle.model.inputs import make_input
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.positions import new_tokens


def logits(
    checkpoint: str | Path,
    input_ids: Tensor,
    pixel_values: Tensor | None = None,
    *,
    allow_long_prompts: bool = False,
) -> Tensor:
    """Logits of one sequence under the latest weights in a Megatron checkpoint of any layout.

    Loads the whole model in fp32 into this process (its GPU if it has one), LoRA adapters beside their base,
    and releases it again. A process group is made if there is none, without a network port, and destroyed; an
    existing one is left alone.

    Args:
        checkpoint: the checkpoint's folder.
        input_ids: [1, s] or [s]; image tokens are the model's own `image_token_index`.
        pixel_values: tiles [n, 3, S, S] in [-1, 1], in reading order; None or n = 0 for text only.
        allow_long_prompts: warn of a sequence longer than the model was trained for, instead of refusing it.

    Returns:
        [1, s, vocabulary] fp32 on the CPU, without padding rows.

    Raises:
        UserError: no checkpoint there, more than one sequence, a longer one than the model was trained for,
            ids outside the vocabulary, or image tokens and tiles that do not match (both counts are named).
    """
    prompts = [(input_ids, pixel_values)]
    return many_logits(checkpoint, prompts, allow_long_prompts=allow_long_prompts)[0]


@torch.no_grad()
def many_logits(
    checkpoint: str | Path,
    prompts: Sequence[tuple[Tensor, Tensor | None]],
    *,
    allow_long_prompts: bool = False,
    first_positions: Sequence[int] | None = None,
) -> list[Tensor]:
    """`logits` of several prompts (input_ids, pixel_values), with the model loaded once.

    Args:
        first_positions: of each prompt's first token; default: 0.
    """
    config = read_model_config(checkpoint)
    vision = config.vision
    empty = torch.zeros(0, vision.num_channels, vision.image_size, vision.image_size)
    rows = [_one_sequence(ids, config) for ids, _ in prompts]
    starts = first_positions or [0] * len(rows)
    for row in rows:
        new_tokens(len(row), 1, config.text.max_position_embeddings, allow=allow_long_prompts)
    result = []
    with whole_model(config, torch.float32, read_lora_config(checkpoint)) as (model, mesh, device):
        inputs = [
            make_input(
                config,
                mesh,
                device.torch_device,
                input_ids=ids,
                position_ids=torch.arange(start, start + len(ids)),
                document_bounds=[0, len(ids)],
                pixel_values=(empty if pixels is None else pixels).detach().float(),
                targets=None,
            )
            for ids, (_, pixels), start in zip(rows, prompts, starts, strict=True)
        ]
        load_checkpoint(checkpoint, models=[model])
        model.eval()
        for one in inputs:
            result.append(model(one)[..., : config.text.vocab_size].float().cpu())
    return result


def _one_sequence(input_ids: Tensor, config: EagleConfig) -> Tensor:
    """[1, s] or [s] -> [s], checked."""
    ids = input_ids.detach().cpu().long()
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or not len(ids):
        raise UserError(f"input_ids must be one sequence, [s] or [1, s]; got shape {list(input_ids.shape)}")
    if int(ids.min()) < 0 or int(ids.max()) >= config.text.vocab_size:
        raise UserError(
            f"input_ids reach from {int(ids.min())} to {int(ids.max())}; the model has ids below "
            f"{config.text.vocab_size}"
        )
    return ids
