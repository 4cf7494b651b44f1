"""From one pack to what a rank's model takes: context parallel share, visual slots, device.

In two parts. `plan_input` derives what follows from ids and document bounds, on the host and before any pixel
is there: it says which tiles this rank decodes. `build_input` puts the tensors on the device. Both are done
once per microbatch; all model chunks of a rank share the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import sub

import torch
from torch import Tensor

from megatron_eagle.context_parallel.attention import PackedSequence
from megatron_eagle.context_parallel.exchange_choice import KeyExchange, KeyUse, plan_keys
from megatron_eagle.context_parallel.layout import SequenceLayout
from megatron_eagle.context_parallel.pack_rows import PackRows, rows_of_packs
from megatron_eagle.context_parallel.padding import pad_documents
from megatron_eagle.context_parallel.planning import plan_layout
from megatron_eagle.context_parallel.vision_sharding import VisionShare, gather_tiles, share_vision
from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import ModelInput, VisionInput
from megatron_eagle.model.flops import exchange_costs, pair_costs
from megatron_eagle.model.language import MaybeTargets, Targets
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.runtime.device import send_to
from megatron_eagle.runtime.parallel import Mesh


@dataclass(frozen=True, eq=False)
class InputPlan:
    """One rank's share of a pack, as indices."""

    # int64 [s]: the tokens of the pack that this context parallel rank holds, -1 for padding of documents
    token_index: Tensor
    document_bounds: Tensor  # int32, padding counted
    longest_document: int
    layout: SequenceLayout
    keys: KeyUse
    exchange: KeyExchange
    vision: "VisionPlan | None"  # None: not the first stage
    rows: PackRows | None  # None: no loss of routers

    @property
    def tiles(self) -> range | None:
        """The tiles of the pack that this rank decodes; None where there is no vision encoder."""
        return None if self.vision is None else self.vision.share.decoded_tiles

    def to(self, device: torch.device) -> "InputPlan":
        """The same with its indices on `device`."""
        vision = self.vision
        return replace(
            self,
            token_index=self.token_index.to(device, non_blocking=True),
            document_bounds=self.document_bounds.to(device, non_blocking=True),
            exchange=self.exchange.each(lambda rows: rows.to(device, non_blocking=True)),
            vision=vision and VisionPlan(vision.share.to(device), vision.rows.to(device, non_blocking=True)),
            rows=self.rows and self.rows.to(device),
        )

    def pin_memory(self) -> "InputPlan":
        """The same in pinned memory, so that `to` does not wait for the device."""
        vision = self.vision
        return replace(
            self,
            token_index=self.token_index.pin_memory(),
            document_bounds=self.document_bounds.pin_memory(),
            exchange=self.exchange.each(Tensor.pin_memory),
            vision=vision and VisionPlan(vision.share.pin_memory(), vision.rows.pin_memory()),
            rows=self.rows and self.rows.pin_memory(),
        )


@dataclass(frozen=True, eq=False)
class Balance:
    """What the losses of routers are of: the tokens of packs, and of these a mean."""

    filled: Tensor  # [S] bool: tokens that are no padding
    step_packs: int  # packs of the global batch


@dataclass(frozen=True, eq=False)
class VisionPlan:
    """What a rank of the first stage does with a pack's tiles."""

    share: VisionShare  # who encodes and exchanges what
    rows: Tensor  # int64 [i]: of the hidden states, those that take the received features


def plan_input(
    eagle: EagleConfig,
    mesh: Mesh,
    *,
    input_ids: Tensor,
    document_bounds: Sequence[int],
    num_tiles: int | None,
    balance: Balance | None = None,
) -> InputPlan:
    """Cut one pack for this rank. No communication.

    Args:
        input_ids: [S] int64.
        document_bounds: 0, document ends, S.
        num_tiles: of the pack; None on ranks that do not hold the vision encoder.
        balance: None: routers, if there are any, have no loss.
    Raises:
        UserError: the image tokens and the tiles of the pack do not match, or the pack does not
            fit the layout (`planning.plan_layout`).
    """
    ulysses, length = mesh.config.ulysses_parallel_size, len(input_ids)
    source = torch.arange(length)
    if mesh.config.pad_documents and mesh.cp.size > 1:
        rows = mesh.tp.size if mesh.config.sequence_parallel else 1
        document_bounds, source = pad_documents(
            length, document_bounds, 2 * mesh.cp.size, 2 * mesh.cp.size * rows
        )
        length = len(source)
    key_layout = plan_layout(  # what ranks hold in attention
        mesh.config.context_parallel_layout,
        length,
        mesh.cp.size // ulysses,
        document_bounds,
        mesh.config.context_parallel_chunk_size,
        costs=pair_costs(eagle),
        node=mesh.config.key_ranks_per_node(mesh.ranks_per_node),
    )
    layout = key_layout.cut_each(ulysses)
    if num_tiles is None:
        vision = None
    else:
        image = (input_ids == eagle.image_token_index)[source] & (source >= 0)
        _check_tiles(eagle, image, num_tiles)
        vision = _plan_vision(layout, image, num_tiles, eagle.tokens_per_tile, mesh)
    keys, exchange = plan_keys(
        key_layout,
        mesh.cp.rank // ulysses,
        document_bounds,
        mesh.config.key_comm,
        exchange_costs(eagle, mesh.config, mesh.ranks_per_node),
        mesh.config.ring_node_size,
    )
    token_index = source[layout.token_index(mesh.cp.rank)]
    routed = None
    if balance is not None and eagle.text.experts is not None:
        held = (
            token_index.view(mesh.tp.size, -1)[mesh.tp.rank] if mesh.config.sequence_parallel else token_index
        )
        routed = rows_of_packs(balance.filled, held, mesh.config.packs, balance.step_packs)
    return InputPlan(
        token_index=token_index,
        document_bounds=torch.tensor(document_bounds, dtype=torch.int32),
        longest_document=max(map(sub, document_bounds[1:], document_bounds)),
        layout=layout,
        keys=keys,
        exchange=exchange,
        vision=vision,
        rows=routed,
    )


def build_input(
    plan: InputPlan,
    device: torch.device,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    tiles: Tensor | None,
    targets: MaybeTargets,
) -> ModelInput[MaybeTargets]:
    """This rank's share of a pack on the device. Collective where ranks divide the decoding of tiles.

    Args:
        input_ids, position_ids: [S] int64; positions restart in every document.
        tiles: [i, channels, size, size], the tiles of `plan.tiles`, of any type.
        targets: of all tokens, on any device, with labels that `check_labels` has seen; None: for logits.
    """
    supervised = None if targets is None else _supervised(plan, targets.loss_weights, device)
    plan = plan.to(device)
    padding = plan.token_index < 0

    def local(x: Tensor) -> Tensor:
        return x.to(device, non_blocking=True)[plan.token_index].masked_fill(padding, 0)

    vision = None
    if plan.vision is not None:
        assert tiles is not None, "the first stage has tiles, none of them perhaps"
        pixels = gather_tiles(tiles.to(device, non_blocking=True), plan.vision.share)
        vision = VisionInput(pixels, plan.vision.share, plan.vision.rows)
    return ModelInput(
        input_ids=local(input_ids)[None],
        targets=targets
        and Targets(local(targets.labels), local(targets.loss_weights), local(targets.group_ids), supervised),
        packed=PackedSequence(
            cu_seqlens_q=plan.document_bounds,
            max_seqlen_q=plan.longest_document,
            position_ids=local(position_ids),
            layout=plan.layout,
            exchange=plan.exchange,
            pack_rows=plan.rows,
        ),
        vision=vision,
    )


def make_input(
    eagle: EagleConfig,
    mesh: Mesh,
    device: torch.device,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    document_bounds: Sequence[int],
    pixel_values: Tensor | None,
    targets: MaybeTargets,
    balance: Balance | None = None,
) -> ModelInput[MaybeTargets]:
    """`plan_input` and `build_input` for a pack whose tiles are all at hand.

    Args:
        pixel_values: [n, channels, size, size], all tiles of the pack in reading order; None on ranks
            that do not hold the vision encoder.
    Raises:
        UserError: as `plan_input`, and for tiles of another size or with pixels that are no numbers.
    """
    plan = plan_input(
        eagle,
        mesh,
        input_ids=input_ids,
        document_bounds=document_bounds,
        num_tiles=None if pixel_values is None else len(pixel_values),
        balance=balance,
    )
    tiles = None
    if pixel_values is not None:
        _check_pixels(eagle, pixel_values)
        own = plan.tiles or range(0)
        tiles = pixel_values[own.start : own.stop]
    if targets is not None:
        check_labels(eagle, targets.labels, targets.loss_weights)
    return build_input(
        plan,
        device,
        input_ids=input_ids,
        position_ids=position_ids,
        tiles=tiles,
        targets=targets,
    )


def check_labels(eagle: EagleConfig, labels: Tensor, loss_weights: Tensor) -> None:
    """
    Raises:
        UserError: a label with a weight in the loss that is no token of the vocabulary.
    """
    rows = eagle.text.vocab_size
    wrong = labels[(loss_weights != 0) & ((labels < 0) | (labels >= rows))]
    if wrong.numel():
        raise UserError(
            f"{wrong.numel()} labels are outside of the vocabulary's 0..{rows - 1}, the first is "
            f"{wrong[0].item()}: the data are of another tokenizer, or damaged"
        )


def _supervised(plan: InputPlan, loss_weights: Tensor, device: torch.device) -> Tensor | None:
    """Places, among this rank's tokens, of those with a weight; None where the host does not know weights."""
    if loss_weights.device.type != "cpu":
        return None
    own = plan.token_index
    rows = loss_weights[own].masked_fill(own < 0, 0).nonzero().squeeze(1)
    return send_to(device, rows)


def _check_tiles(eagle: EagleConfig, image: Tensor, num_tiles: int) -> None:
    image_tokens, expected = int(image.sum()), num_tiles * eagle.tokens_per_tile
    if image_tokens != expected:
        raise UserError(
            f"{image_tokens} image tokens (id {eagle.image_token_index}) but {num_tiles} tiles x "
            f"{eagle.tokens_per_tile} = {expected} image features: text and tiles belong to different samples"
        )


def _plan_vision(
    layout: SequenceLayout, image: Tensor, num_tiles: int, tokens_per_tile: int, mesh: Mesh
) -> VisionPlan:
    """This rank's tiles and the exchange of features, as `vision_sharding` says.

    Args:
        image: [S] bool: the pack's image tokens.
    """
    tp, cp, mode = mesh.tp, mesh.cp, mesh.config.vision_sharding
    slots = image.cumsum(0) - 1
    # The tokens whose hidden states each (cp, tp) rank holds, in order: [cp, tp, r].
    tokens = layout.rank_major_order.view(cp.size, 1, -1)
    if mesh.config.sequence_parallel:
        tokens = tokens.view(cp.size, tp.size, -1)
    else:
        tokens = tokens.expand(cp.size, tp.size, -1)
    mine = tokens[cp.rank, tp.rank]
    if mode == "none":
        holders, rank, group, decode_group = [mine], 0, None, mesh.groups.tp_cp
    elif mode == "cp":
        holders, rank, group, decode_group = list(tokens[:, tp.rank]), cp.rank, cp.group, tp.group
    else:
        holders, rank, group = list(tokens.flatten(0, 1)), cp.rank * tp.size + tp.rank, mesh.groups.tp_cp
        decode_group = None
    share = share_vision(
        num_tiles,
        tokens_per_tile,
        [slots[held[image[held]]] for held in holders],
        rank=rank,
        copies=tp.size if mode == "cp_tp" and not mesh.config.sequence_parallel else 1,
        group=group,
        decode_group=decode_group,
    )
    return VisionPlan(share, image[mine].nonzero().squeeze(1)[share.receive_order])


def _check_pixels(eagle: EagleConfig, pixel_values: Tensor) -> None:
    size = eagle.vision.image_size
    if pixel_values.shape[2:] != (size, size):
        found = " x ".join(str(n) for n in pixel_values.shape[2:])
        raise UserError(f"tiles are {found} pixels and the model's vision.image_size is {size}")
    if not torch.isfinite(pixel_values.sum()):
        raise UserError("tiles hold NaN or infinite pixels: look at the media of this pack's samples")
