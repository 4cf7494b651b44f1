"""One pack as the model takes it: ids, labels, loss weights, groups, positions, document bounds, tiles.

Shapes: s tokens of a pack, n tiles, S tile size in pixels.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from megatron_eagle.data.loading.loss_weights import answer_weights
from megatron_eagle.data.packing.index import PackIndex
from megatron_eagle.data.store.reader import SampleStore, StoredSample
from megatron_eagle.errors import UserError


class RankPlan(Protocol):
    """What a rank derives from a pack's tokens before media are read (training passes in who does it)."""

    @property
    def tiles(self) -> range | None:
        """The tiles of the pack that this rank decodes; None where it takes no pixels."""


@dataclass
class Batch:
    """One microbatch: a pack of exactly s tokens, as host tensors.

    `loss_weights[i]` is the weight of predicting `labels[i]`, already divided by the global batch's
    normaliser; it is 0 across document bounds and in the padding, which is a document of its own at the end.
    """

    input_ids: torch.Tensor
    """int64 [s]."""
    labels: torch.Tensor
    """int64 [s]: the next token, 0 at the end."""
    loss_weights: torch.Tensor
    """float32 [s]."""
    group_ids: torch.Tensor
    """int64 [s]: the losses of tokens with the same number are also summed apart.  The number of the sample's
    data set; 0 in the padding, which has no weight."""
    position_ids: torch.Tensor
    """int64 [s], from 0 in each document."""
    document_bounds: list[int]
    """0, ..., s."""
    pixel_values: torch.Tensor | None
    """uint8 [i, 3, S, S], in the order of the image tokens: the tiles of `plan.tiles`."""
    n_tiles: int
    """Of the whole pack."""
    sample_rows: list[int]
    """Store rows of the documents, without the padding."""
    n_frames: int = 0
    """Of the tiles, those that are frames; the others are of pictures and pages."""
    frames_wanted: int = 0
    """Frames without a token limit."""
    tiles_wanted: int = 0
    """Tiles of pictures and pages without a token limit."""
    first_sample: int = 0
    """Number of the first document among the samples of the global batch."""
    plan: RankPlan | None = None


def normalizer(index: PackIndex, packs: np.ndarray, weighting: str, multi_turn: bool) -> float:
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

    Those at the places `left_out` have none; if `total` is 0, none has.
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
    store: SampleStore,
    rows: list[int],
    *,
    weighting: str,
    multi_turn: bool,
    total: float,
    first_sample: int = 0,
    length: int | None = None,
) -> Batch:
    """The tokens of a pack, without its pixels.  `total` is the normaliser of the global batch; `length` is
    the store's unless given."""
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
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(np.append(ids[1:], 0)),
        loss_weights=token_weights(samples, length, weighting=weighting, multi_turn=multi_turn, total=total),
        group_ids=torch.from_numpy(groups),
        position_ids=torch.from_numpy(positions),
        document_bounds=bounds,
        pixel_values=None,
        n_tiles=n_tiles,
        sample_rows=list(rows),
        n_frames=sum(sample.n_frames for sample in samples),
        frames_wanted=sum(sample.frames_wanted for sample in samples),
        tiles_wanted=sum(sample.tiles_wanted for sample in samples),
        first_sample=first_sample,
    )
