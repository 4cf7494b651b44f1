"""From one pack to what a rank's model takes: device, context parallel share, visual slots."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_eagle.context_parallel.attention import PackedSequence
from megatron_eagle.context_parallel.exchange import plan_exchange
from megatron_eagle.context_parallel.planning import plan_layout
from megatron_eagle.context_parallel.vision_sharding import share_vision
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
        UserError: the image tokens and the tiles of the pack do not match, or the pack does not
            fit the layout (`planning.plan_layout`).
    """
    ulysses = mesh.config.ulysses_parallel_size
    key_layout = plan_layout(  # what ranks hold in attention
        mesh.config.context_parallel_layout,
        len(input_ids),
        mesh.cp.size // ulysses,
        document_bounds,
        mesh.config.context_parallel_chunk_size,
    )
    layout = key_layout.cut_each(ulysses)
    index = layout.token_index(mesh.cp.rank)

    def local(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[index].to(device, non_blocking=True)

    inputs = ModelInput(
        input_ids=local(input_ids)[None],
        labels=None if labels is None else local(labels)[None],
        loss_weights=local(loss_weights),
        packed=PackedSequence(
            position_ids=local(position_ids),
            layout=layout,
            exchange=plan_exchange(key_layout, mesh.cp.rank // ulysses, document_bounds).to(device),
        ),
    )
    if pixel_values is not None:
        image = input_ids == eagle.image_token_index
        _check_images(eagle, int(image.sum()), pixel_values)
        _add_vision(inputs, image, pixel_values, eagle.tokens_per_tile, mesh, device)
    return inputs


def _add_vision(
    inputs: ModelInput,
    image: Tensor,
    pixel_values: Tensor,
    tokens_per_tile: int,
    mesh: Mesh,
    device: torch.device,
) -> None:
    """Fill in this rank's tiles and the exchange of features, as `vision_sharding` says."""
    tp, cp, mode = mesh.tp, mesh.cp, mesh.config.vision_sharding
    slots = image.cumsum(0) - 1
    # The tokens whose hidden states each (cp, tp) rank holds, in order: [cp, tp, r].
    tokens = inputs.packed.layout.rank_major_order.view(cp.size, 1, -1)
    if mesh.config.sequence_parallel:
        tokens = tokens.view(cp.size, tp.size, -1)
    else:
        tokens = tokens.expand(cp.size, tp.size, -1)
    mine = tokens[cp.rank, tp.rank]
    if mode == "none":
        holders, rank, group = [mine], 0, None
    elif mode == "cp":
        holders, rank, group = list(tokens[:, tp.rank]), cp.rank, cp.group
    else:
        holders, rank, group = list(tokens.flatten(0, 1)), cp.rank * tp.size + tp.rank, mesh.groups.tp_cp
    share = share_vision(
        pixel_values.shape[0],
        tokens_per_tile,
        [slots[held[image[held]]] for held in holders],
        rank=rank,
        copies=tp.size if mode == "cp_tp" and not mesh.config.sequence_parallel else 1,
        group=group,
    )
    inputs.vision = share
    inputs.pixel_values = share.tiles(pixel_values).to(device, non_blocking=True)
    inputs.image_rows = image[mine].nonzero().squeeze(1)[share.receive_order].to(device)


def _check_images(eagle: EagleConfig, image_tokens: int, pixel_values: Tensor) -> None:
    size = eagle.vision.image_size
    if pixel_values.shape[2:] != (size, size):
        found = " x ".join(str(n) for n in pixel_values.shape[2:])
        raise UserError(f"tiles are {found} pixels and the model's vision.image_size is {size}")
    if not torch.isfinite(pixel_values.sum()):
        raise UserError("tiles hold NaN or infinite pixels: look at the media of this pack's samples")
    expected = pixel_values.shape[0] * eagle.tokens_per_tile
    if image_tokens != expected:
        raise UserError(
            f"{image_tokens} image tokens (id {eagle.image_token_index}) but {pixel_values.shape[0]} tiles x "
            f"{eagle.tokens_per_tile} = {expected} image features: text and tiles belong to different samples"
        )
