"""Encode every tile once: tiles are divided over ranks, features travel to where their tokens live.

Modes (`parallel.vision_sharding`):
    none   every rank encodes all tiles of its pack; the vision encoder is tensor parallel.
    cp     tiles are divided over the context parallel ranks; the vision encoder is tensor parallel.
    cp_tp  tiles are divided over context x tensor parallel ranks; each holds the whole encoder, whose
           gradients are then summed over the tensor parallel ranks (`sum_encoder_gradients`).

Every rank knows the whole pack, so who sends which feature to whom is computed on the host and nothing
is negotiated. One all-to-all moves each feature exactly once to each rank that needs it, and its
backward is the reverse all-to-all. A feature is one image token (t of them per tile); "slot" is its
number in the pack's reading order.

Ranks that encode the same tiles (all of `none`; the tensor parallel ranks of `cp`) divide the reading of
their files: each decodes a part, and `gather_tiles` gives each the pixels of all.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VisionShare:
    """One rank's part of a pack's vision work."""

    first_tile: int
    last_tile: int  # exclusive
    # Tiles really encoded: zero tiles are appended so that every rank runs the same shapes, and at least
    # one, so that a rank or a pack without images takes part in the same reductions as the others.
    encoded_tiles: int
    send_rows: Tensor  # int64: rows of this rank's features, ordered by receiver
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    receive_order: Tensor  # int64: received row i is the wanted slot receive_order[i] of this rank
    copies: int  # ranks that receive the same feature and will return the same gradient
    group: dist.ProcessGroup | None  # None: nothing to exchange
    decode_group: dist.ProcessGroup | None  # the ranks that encode these tiles; None: only this one

    @property
    def decoded_tiles(self) -> range:
        """The tiles of the pack that this rank decodes, some of those that it encodes or all."""
        tiles = range(self.first_tile, self.last_tile)
        if self.decode_group is None:
            return tiles
        start = self.decode_group.rank() * self._decoded_each
        return tiles[start : start + self._decoded_each]

    @property
    def _decoded_each(self) -> int:
        size = 1 if self.decode_group is None else self.decode_group.size()
        return -(-self.encoded_tiles // size)

    def to(self, device: torch.device) -> "VisionShare":
        """The same with the rows that the exchange reads on `device`."""
        return replace(self, send_rows=self.send_rows.to(device, non_blocking=True))

    def pin_memory(self) -> "VisionShare":
        """The same with its indices in pinned memory, so that `to` does not wait for the device."""
        return replace(
            self, send_rows=self.send_rows.pin_memory(), receive_order=self.receive_order.pin_memory()
        )


def share_vision(
    num_tiles: int,
    tokens_per_tile: int,
    wanted: Sequence[Tensor],
    *,
    rank: int,
    copies: int = 1,
    group: dist.ProcessGroup | None = None,
    decode_group: dist.ProcessGroup | None = None,
) -> VisionShare:
    """Divide a pack's tiles over `len(wanted)` ranks, in equal contiguous runs.

    Args:
        wanted: for each rank of `group`, the slots that its tokens take, int64.
        rank: this process's place in `wanted`.
        copies: how many ranks want each slot.
        decode_group: the ranks that are given the same `rank`.
    """
    size = len(wanted)
    bounds = torch.tensor([num_tiles * i // size for i in range(size + 1)])
    owners = [torch.bucketize(slots // tokens_per_tile, bounds[1:], right=True) for slots in wanted]
    first_slot = bounds[rank] * tokens_per_tile
    sent = [slots[owner == rank] - first_slot for slots, owner in zip(wanted, owners, strict=True)]
    return VisionShare(
        first_tile=int(bounds[rank]),
        last_tile=int(bounds[rank + 1]),
        encoded_tiles=max(1, -(-num_tiles // size)),
        send_rows=torch.cat(sent),
        send_counts=tuple(len(rows) for rows in sent),
        receive_counts=tuple(torch.bincount(owners[rank], minlength=size).tolist()),
        receive_order=torch.argsort(owners[rank], stable=True),
        copies=copies,
        group=group if size > 1 and num_tiles else None,
        decode_group=decode_group if decode_group is not None and decode_group.size() > 1 else None,
    )


def gather_tiles(decoded: Tensor, share: VisionShare) -> Tensor:
    """Each rank's `decoded_tiles` [i, c, S, S] -> the tiles to encode [encoded_tiles, c, S, S], what is
    missing as zeros. Collective over `share.decode_group`."""
    missing = share._decoded_each - decoded.shape[0]
    if missing:
        decoded = torch.cat([decoded, decoded.new_zeros((missing, *decoded.shape[1:]))])
    if share.decode_group is None:
        return decoded
    tiles = decoded.new_empty((share.decode_group.size() * len(decoded), *decoded.shape[1:]))
    dist.all_gather_into_tensor(tiles, decoded.contiguous(), group=share.decode_group)
    return tiles[: share.encoded_tiles]


def exchange_features(features: Tensor, share: VisionShare) -> Tensor:
    """[own features, h] of each rank -> [wanted features, h], in `share.receive_order`."""
    if share.group is None:
        return features[share.send_rows]
    wanted: Tensor = _Exchange.apply(features, share)
    return wanted


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, share: VisionShare) -> Tensor:
        ctx.share, ctx.num_features = share, features.shape[0]
        sent = features[share.send_rows]
        received = features.new_empty((sum(share.receive_counts), features.shape[1]))
        counts = list(share.receive_counts), list(share.send_counts)
        dist.all_to_all_single(received, sent, *counts, group=share.group)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        share = ctx.share
        returned = grad.new_empty((sum(share.send_counts), grad.shape[1]))
        counts = list(share.send_counts), list(share.receive_counts)
        dist.all_to_all_single(returned, grad.contiguous(), *counts, group=share.group)
        own = grad.new_zeros((ctx.num_features, grad.shape[1]), dtype=torch.float32)
        own.index_add_(0, share.send_rows, returned.float())
        return (own / share.copies).to(grad.dtype), None


def sum_encoder_gradients(gradients: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Sum gradients over tensor parallel ranks in place, in one collective: their tiles were different.

    Megatron sums the gradients of replicated parameters only under sequence parallelism.
    """
    gradients = list(gradients)
    if not gradients or group.size() == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat, group=group)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
