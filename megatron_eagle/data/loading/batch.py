"""A pack's tokens out of the store: ids, labels, loss weights, groups, positions, document bounds.

Shapes: s tokens of a pack.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.data.loading.loss_weights import answer_weights
from megatron_eagle.data.loading.packs import PackedSample, TokenPack
from megatron_eagle.data.packing.index import Packs
from megatron_eagle.data.store.reader import Rows, StoredSample
from megatron_eagle.errors import UserError


def normalizer(index: Packs, packs: np.ndarray, weighting: str, multi_turn: bool) -> float:
    """The sum of all loss weights of these packs, from the index alone."""
    if weighting == "token":
        return float(index.column("n_supervised", packs).sum())
    if weighting == "square":
        return float(index.column("sum_sqrt_per_answer" if multi_turn else "sum_sqrt", packs).sum())
    return float(index.column("n_answers" if multi_turn else "n_samples", packs).sum())


def sample_weight(sample: StoredSample, weighting: str, multi_turn: bool) -> float:
    """The sum of a sample's loss weights, before the normaliser."""
    table = answer_weights(sample.answer_lengths, weighting, multi_turn)
    return float(np.dot(table[1:], sample.answer_lengths))


def token_weights(
    store: Rows,
    samples: Sequence[PackedSample],
    length: int,
    *,
    weighting: str,
    multi_turn: bool,
    total: float,
    left_out: Collection[int] = (),
) -> Tensor:
    """Loss weights of a pack with these samples, float32 [s].

    Args:
        total: the normaliser of the global batch; 0: no token has a weight.
        left_out: numbers of samples whose tokens have none.
    """
    weights = np.zeros(length, np.float64)
    for packed in samples:
        if packed.number not in left_out and total:
            # A position predicts the token after it, so its weight is that token's; a document's first is not
            # predicted.
            sample = store[packed.row]
            table = answer_weights(sample.answer_lengths, weighting, multi_turn)
            weights[packed.start : packed.end - 1] = table[sample.answers[1:]] / total
    return torch.from_numpy(weights.astype(np.float32))


def assemble(
    store: Rows,
    rows: list[int],
    *,
    weighting: str,
    multi_turn: bool,
    total: float,
    first_sample: int = 0,
    length: int | None = None,
) -> TokenPack:
    """The tokens of a pack of the index.

    Args:
        total: the normaliser of the global batch.
        first_sample: number of the first row among the samples of the global batch.
        length: tokens of the pack; None: the store's.

    Raises:
        UserError: the rows' image tokens are not those of their tiles: the store is damaged.
    """
    length = length or store.length
    ids = np.full(length, store.manifest.pad_token_id, np.int64)
    positions, groups = np.zeros(length, np.int64), np.zeros(length, np.int64)
    bounds, packed = [0], []
    samples = [store[row] for row in rows]
    for number, (row, sample) in enumerate(zip(rows, samples, strict=True), first_sample):
        start, end = bounds[-1], bounds[-1] + sample.n_tokens
        packed.append(PackedSample(number, row, start, end))
        ids[start:end] = sample.ids
        positions[start:end] = np.arange(sample.n_tokens)
        groups[start:end] = sample.dataset
        bounds.append(end)
    if bounds[-1] < length:
        positions[bounds[-1] :] = np.arange(length - bounds[-1])
        bounds.append(length)
    n_tiles = sum(sample.n_tiles for sample in samples)
    n_image_tokens = int((ids == store.manifest.image_token_id).sum())
    if n_image_tokens != n_tiles * store.manifest.tokens_per_tile:
        raise UserError(
            f"rows {rows} of {store.folder} hold {n_image_tokens} image tokens for {n_tiles} tiles of "
            f"{store.manifest.tokens_per_tile}; the store is damaged, preprocess the data again"
        )
    return TokenPack(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(np.append(ids[1:], 0)),
        loss_weights=token_weights(
            store, packed, length, weighting=weighting, multi_turn=multi_turn, total=total
        ),
        group_ids=torch.from_numpy(groups),
        position_ids=torch.from_numpy(positions),
        document_bounds=bounds,
        n_tiles=n_tiles,
        samples=packed,
        n_frames=sum(sample.n_frames for sample in samples),
        frames_wanted=sum(sample.frames_wanted for sample in samples),
        tiles_wanted=sum(sample.tiles_wanted for sample in samples),
    )


def join(packs: Sequence[TokenPack]) -> TokenPack:
    """Packs end to end, as one. No document of one sees another's: their bounds stay."""
    if len(packs) == 1:
        return packs[0]
    bounds, samples = [0], []
    for pack in packs:
        start = bounds[-1]
        bounds += [start + bound for bound in pack.document_bounds[1:]]
        samples += [replace(s, start=start + s.start, end=start + s.end) for s in pack.samples]
    return TokenPack(
        input_ids=torch.cat([pack.input_ids for pack in packs]),
        labels=torch.cat([pack.labels for pack in packs]),
        loss_weights=torch.cat([pack.loss_weights for pack in packs]),
        group_ids=torch.cat([pack.group_ids for pack in packs]),
        position_ids=torch.cat([pack.position_ids for pack in packs]),
        document_bounds=bounds,
        n_tiles=sum(pack.n_tiles for pack in packs),
        samples=samples,
        n_frames=sum(pack.n_frames for pack in packs),
        frames_wanted=sum(pack.frames_wanted for pack in packs),
        tiles_wanted=sum(pack.tiles_wanted for pack in packs),
    )
