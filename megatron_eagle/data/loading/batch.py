"""A pack's tokens out of the store: ids, labels, loss weights, groups, positions, document bounds.

Shapes: s tokens of a pack.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch

from megatron_eagle.data.loading.loss_weights import answer_weights
from megatron_eagle.data.loading.packs import TokenPack
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
    samples: Sequence[StoredSample],
    length: int,
    *,
    weighting: str,
    multi_turn: bool,
    total: float,
    left_out: Collection[int] = (),
) -> torch.Tensor:
    """Loss weights of a pack of these samples, float32 [s].

    Args:
        total: the normaliser of the global batch; 0: no token has a weight.
        left_out: places of samples whose tokens have none.
    """
    weights = np.zeros(length, np.float64)
    start = 0
    for place, sample in enumerate(samples):
        end = start + sample.n_tokens
        if place not in left_out and total:
            # A position predicts the token after it, so its weight is that token's; a document's first is not
            # predicted.
            table = answer_weights(sample.answer_lengths, weighting, multi_turn)
            weights[start : end - 1] = table[sample.answers[1:]] / total
        start = end
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
    """The tokens of a pack.

    Args:
        total: the normaliser of the global batch.
        length: tokens of the pack; None: the store's.

    Raises:
        UserError: the rows' image tokens are not those of their tiles: the store is damaged.
    """
    length = length or store.length
    ids = np.full(length, store.manifest.pad_token_id, np.int64)
    positions, groups = np.zeros(length, np.int64), np.zeros(length, np.int64)
    bounds = [0]
    samples = [store[row] for row in rows]
    for sample in samples:
        start, end = bounds[-1], bounds[-1] + sample.n_tokens
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
        loss_weights=token_weights(samples, length, weighting=weighting, multi_turn=multi_turn, total=total),
        group_ids=torch.from_numpy(groups),
        position_ids=torch.from_numpy(positions),
        document_bounds=bounds,
        n_tiles=n_tiles,
        sample_rows=list(rows),
        n_frames=sum(sample.n_frames for sample in samples),
        frames_wanted=sum(sample.frames_wanted for sample in samples),
        tiles_wanted=sum(sample.tiles_wanted for sample in samples),
        first_sample=first_sample,
    )
