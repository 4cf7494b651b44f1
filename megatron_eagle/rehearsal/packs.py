"""Packs that nobody has written: one long document, many short ones, no picture, as many tiles as fit.

A step deals them out so that data parallel ranks have different ones at the same time, which is when
exchanges, tile counts and shapes differ most. The tensors are real and on the host; pixels are black.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from megatron_eagle.data.loading.batch import join
from megatron_eagle.data.loading.identity import DataIdentity
from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.loading.packs import (
    BatchLoader,
    GlobalBatch,
    LoadedPack,
    PackedSample,
    PlannedBatch,
    TokenPack,
)
from megatron_eagle.model.inputs import InputPlan
from megatron_eagle.model.presets import EagleConfig

PACK_KINDS = ("one document", "many documents", "no picture", "most tiles")
_TEXT_BESIDE_TILES = 32  # tokens, of the pack with most tiles


def made_up_pack(eagle: EagleConfig, length: int, kind: str, number: int) -> TokenPack:
    """A pack of `kind`; `number` varies its documents a little, so that no two plans are the same."""
    per_tile = eagle.tokens_per_tile
    most = max(0, length - _TEXT_BESIDE_TILES) // per_tile
    padding = 8 * (1 + number % 7) if length > 256 else number % 3
    if kind in ("one document", "most tiles"):
        bounds = [0, length - padding, length] if padding else [0, length]
    else:
        bounds = _many(length, padding)
    # No tile lies in the padding.
    most = min(most, (bounds[-2] if padding else length) // per_tile)
    tiles = {"no picture": 0, "most tiles": most}.get(kind, most // 2)
    image, placed = eagle.image_token_index, 0
    assert image is not None, "the model is complete"
    ids = torch.full((length,), 0 if image else 1, dtype=torch.int64)
    for start, end in pairwise(bounds[:-1] if padding else bounds):
        # Half of each document, until there are enough; "most tiles" has one document.
        here = (end - start) // per_tile if kind == "most tiles" else (end - start) // (2 * per_tile)
        here = min(here, tiles - placed)
        ids[start : start + here * per_tile] = image
        placed += here
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)])
    labels = torch.cat([ids[1:], ids.new_zeros(1)])
    weights = torch.where(labels == image, 0.0, 1.0 / length)
    weights[[end - 1 for end in bounds[1:]]] = 0
    ends = list(pairwise(bounds[:-1] if padding else bounds))
    return TokenPack(
        input_ids=ids,
        labels=labels,
        loss_weights=weights,
        group_ids=torch.zeros(length, dtype=torch.int64),
        position_ids=positions,
        document_bounds=bounds,
        n_tiles=placed,
        samples=[PackedSample(i, i, *ends[i]) for i in range(len(ends))],
        n_frames=0,
        frames_wanted=0,
        tiles_wanted=placed,
    )


def _many(length: int, padding: int) -> list[int]:
    """Bounds of about 40 documents of very different lengths (each some more than the one before)."""
    text = length - padding
    count = min(40, max(2, text // 16))
    ends = [text * i * (i + 1) // (count * (count + 1)) for i in range(count + 1)]
    bounds = sorted(set(ends))
    return [*bounds, length] if padding else bounds


@dataclass(frozen=True)
class MadeUp:
    """Opens loaders of such packs, in place of `PackLoader`: packs of `kinds` in turn for `eagle`."""

    eagle: EagleConfig
    kinds: tuple[str, ...] = PACK_KINDS

    def packs(self, config: DataConfig, rank: int, number: int) -> list[TokenPack]:
        """Those of microbatch `number` of a data parallel rank: of kind rank + number, and the next ones."""
        first = rank + number
        return [
            made_up_pack(
                self.eagle, config.length, self.kinds[(first + place) % len(self.kinds)], number + place
            )
            for place in range(config.packs_per_sequence)
        ]

    def __call__(
        self,
        config: DataConfig,
        /,
        *,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        plan: Callable[[TokenPack], InputPlan],
        patch_cost: float,  # noqa: ARG002
        device: torch.device,
    ) -> BatchLoader[InputPlan]:
        count = global_batch_size // data_parallel_size // config.packs_per_sequence
        return _MadeUpPacks(self, config, data_parallel_rank, count, plan, device.type == "cuda")


class _MadeUpPacks:
    """One data parallel rank's: its m-th microbatch is of kind rank + m, round and round."""

    def __init__(
        self,
        made_up: MadeUp,
        config: DataConfig,
        rank: int,
        count: int,
        plan: Callable[[TokenPack], InputPlan],
        pinned: bool,
    ) -> None:
        self._made_up, self._config, self._rank, self._count = made_up, config, rank, count
        self._plan, self._pinned = plan, pinned
        self._loaded: list[LoadedPack[InputPlan]] = []
        self._total = 1.0
        self._identity = DataIdentity("made up", config.length, 0, "square", False, "made up", "made up")

    datasets = ["made up"]
    decoder = "media: made up"
    packs_per_epoch = 10**6

    def identity(self, _first_pack: int, /) -> DataIdentity:
        return self._identity

    def step(self, consumed_packs: int, /) -> GlobalBatch[InputPlan]:
        """The same packs in every step."""
        if not self._loaded:
            self._loaded = [self._load(number) for number in range(self._count)]
        return GlobalBatch(consumed_packs, self._loaded, self._total)

    def n_samples(self, _consumed_packs: int, /) -> int:
        return 1

    def leave_out(
        self, _batch: GlobalBatch[InputPlan], _samples: Collection[int], /
    ) -> GlobalBatch[InputPlan]:
        raise AssertionError("media that are made up do not fail")

    def close(self) -> None:
        pass

    def _load(self, number: int) -> LoadedPack[InputPlan]:
        eagle = self._made_up.eagle
        tokens = join(self._made_up.packs(self._config, self._rank, number))
        tokens = replace(tokens, loss_weights=tokens.loss_weights / self._count)
        plan = self._plan(tokens)
        pixels = None
        if plan.tiles is not None:
            size = eagle.vision.image_size
            shape = len(plan.tiles), eagle.vision.num_channels, size, size
            pixels = torch.zeros(shape, dtype=torch.uint8)
        if self._pinned:
            tokens = tokens.pin_memory()
            pixels = pixels if pixels is None else pixels.pin_memory()
        return LoadedPack(**vars(tokens), plan=plan, pixel_values=pixels)


class UnreadPacks(PackLoader[InputPlan]):
    """The run's own packs, with black pixels in place of their media."""

    def __init__(self, config: DataConfig, **options: Any) -> None:
        super().__init__(replace(config, prefetch=False, decoder="exact"), **options)

    def _read_media(self, planned: PlannedBatch[InputPlan]) -> GlobalBatch[InputPlan]:
        size = self.manifest.tile_size
        loaded = []
        for pack in planned.packs:
            tiles = pack.plan.tiles
            pixels = None if tiles is None else torch.zeros(len(tiles), 3, size, size, dtype=torch.uint8)
            if pixels is not None and self._pin_memory:
                pixels = pixels.pin_memory()
            loaded.append(LoadedPack(**vars(pack), pixel_values=pixels))
        return GlobalBatch(planned.first_pack, loaded, planned.total)
