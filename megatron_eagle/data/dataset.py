"""One pack as the model takes it: ids, labels, loss weights, positions, document bounds, tiles.

Shapes: s tokens of a pack, n tiles, S tile size in pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_eagle.data.ledger import Problem
from megatron_eagle.data.loss_weights import answer_weights
from megatron_eagle.data.media.images import load_image
from megatron_eagle.data.media.source import file_facts
from megatron_eagle.data.media.tiles import tile_image
from megatron_eagle.data.media.video import load_frames
from megatron_eagle.data.packing import PackIndex
from megatron_eagle.data.store import ImagePlan, SampleStore, StoredSample
from megatron_eagle.errors import UserError


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
    position_ids: torch.Tensor
    """int64 [s], from 0 in each document."""
    document_bounds: list[int]
    """0, ..., s."""
    pixel_values: torch.Tensor | None
    """float32 [n, 3, S, S] in [-1, 1], in the order of the image tokens; None where media are not decoded."""
    n_tiles: int
    sample_rows: list[int]
    """Store rows of the documents, without the padding."""
    n_frames: int = 0
    """Of the tiles, those that are frames; the others are of pictures and pages."""
    frames_wanted: int = 0
    """Frames without a token limit."""
    tiles_wanted: int = 0
    """Tiles of pictures and pages without a token limit."""


def normalizer(index: PackIndex, packs: np.ndarray, weighting: str, multi_turn: bool) -> float:
    """The sum of all loss weights of these packs, from the index alone."""
    if weighting == "token":
        return float(index.column("n_supervised", packs).sum())
    if weighting == "square":
        return float(index.column("sum_sqrt_per_answer" if multi_turn else "sum_sqrt", packs).sum())
    return float(index.column("n_answers" if multi_turn else "n_samples", packs).sum())


def assemble(store: SampleStore, rows: list[int], *, weighting: str, multi_turn: bool, total: float) -> Batch:
    """The tokens of a pack, without its pixels.  `total` is the normaliser of the global batch."""
    length = store.length
    ids = np.full(length, store.manifest.pad_token_id, np.int64)
    weights = np.zeros(length, np.float64)
    positions = np.zeros(length, np.int64)
    bounds = [0]
    samples = [store[row] for row in rows]
    for sample in samples:
        start, end = bounds[-1], bounds[-1] + sample.n_tokens
        ids[start:end] = sample.ids
        # A position predicts the token after it, so its weight is that token's; a document's first is not
        # predicted.
        table = answer_weights(sample.answer_lengths, weighting, multi_turn)
        weights[start : end - 1] = table[sample.answers[1:]] / total
        positions[start:end] = np.arange(sample.n_tokens)
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
        loss_weights=torch.from_numpy(weights.astype(np.float32)),
        position_ids=torch.from_numpy(positions),
        document_bounds=bounds,
        pixel_values=None,
        n_tiles=n_tiles,
        sample_rows=list(rows),
        n_frames=sum(sample.n_frames for sample in samples),
        frames_wanted=sum(sample.frames_wanted for sample in samples),
        tiles_wanted=sum(sample.tiles_wanted for sample in samples),
    )


def media_loaders(store: SampleStore, row: int) -> list[Callable[[], torch.Tensor]]:
    """One function per picture or video of a row, in reading order, each returning its tiles [n, 3, S, S].

    They raise `UserError` for a file that has changed since it was preprocessed or can no longer be read.
    """
    sample = store[row]
    return [_loader(store, row, sample, position) for position in sample.media_order]


def _loader(store: SampleStore, row: int, sample: StoredSample, position: int) -> Callable[[], torch.Tensor]:
    media = sample.images[position] if position >= 0 else sample.videos[-1 - position]

    def load() -> torch.Tensor:
        try:
            if isinstance(media, ImagePlan):
                _check_unchanged(media)
                image = load_image(media.path, max_pixels=store.manifest.max_pixels)
                return tile_image(image, (media.columns, media.rows), store.manifest.tile_size)
            return load_frames(media.path, media.index, media.frames, tile_size=store.manifest.tile_size)
        except Problem as problem:
            raise UserError(
                f"{problem}; used by row {row} of {store.folder} ({sample.file}:{sample.line})"
            ) from None

    return load


def _check_unchanged(media: ImagePlan) -> None:
    size = file_facts(media.path).size
    if size != media.file_size:
        raise Problem(
            "media changed since preprocessing", f"{media.path} has {size} bytes, had {media.file_size}"
        )
