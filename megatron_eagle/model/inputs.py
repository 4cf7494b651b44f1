"""From one pack to what a rank's model takes: device, context parallel share, visual slots."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_eagle.context_parallel.attention import PackedSequence
from megatron_eagle.context_parallel.layout import zigzag
from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import ModelInput
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.runtime.parallel import Mesh


def make_input(
    eagle: EagleConfig,
    mesh: Mesh,
    device: torch.device,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    document_bounds: Sequence[int],
    pixel_values: Tensor | None,
    labels: Tensor | None = None,
    loss_weights: Tensor | None = None,
) -> ModelInput:
    """Cut one pack for this context parallel rank.

    Args:
        input_ids, position_ids: [S] int64; positions restart in every document.
        document_bounds: 0, document ends, S.
        pixel_values: [n, channels, size, size], all tiles of the pack in reading order; None on ranks
            that do not hold the vision tower.
        labels, loss_weights: [S], already shifted: entry i belongs to the prediction made at token i.
    Raises:
        UserError: the image tokens and the tiles of the pack do not match, or the pack's length does
            not fit the layout.
    """
    image = input_ids == eagle.image_token_index
    if pixel_values is not None:
        _check_images(eagle, int(image.sum()), pixel_values)
    layout = zigzag(len(input_ids), mesh.cp.size)
    index = layout.token_index(mesh.cp.rank)
    image_rows = image[index].nonzero().squeeze(1)
    slots = image.cumsum(0) - 1

    def local(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[index].to(device, non_blocking=True)

    return ModelInput(
        input_ids=local(input_ids)[None],
        labels=None if labels is None else local(labels)[None],
        loss_weights=local(loss_weights),
        image_rows=image_rows.to(device),
        image_slots=slots[index][image_rows].to(device),
        pixel_values=None if pixel_values is None else pixel_values.to(device, non_blocking=True),
        packed=PackedSequence(
            position_ids=local(position_ids),
            layout=layout,
            segments=layout.segments(mesh.cp.rank, document_bounds),
        ),
    )


def _check_images(eagle: EagleConfig, image_tokens: int, pixel_values: Tensor) -> None:
    size = eagle.vision.image_size
    if pixel_values.shape[2:] != (size, size):
        found = " x ".join(str(n) for n in pixel_values.shape[2:])
        raise UserError(f"tiles are {found} pixels and the model's vision.image_size is {size}")
    expected = pixel_values.shape[0] * eagle.tokens_per_tile
    if image_tokens != expected:
        raise UserError(
            f"{image_tokens} image tokens (id {eagle.image_token_index}) but {pixel_values.shape[0]} tiles x "
            f"{eagle.tokens_per_tile} = {expected} image features: text and tiles belong to different samples"
        )
