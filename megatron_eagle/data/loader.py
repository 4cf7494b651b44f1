"""The order of packs, and batches ready when they are asked for.

The whole state is one integer, the number of packs consumed.  Which packs a global batch holds depends on
nothing but the seed and that number; only who gets which of them depends on the data-parallel layout: the
ranks share a global batch so that all have about the same to do.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from megatron_eagle.data.balance import assign, pack_costs
from megatron_eagle.data.dataset import Batch, assemble, media_loaders, normalizer
from megatron_eagle.data.loss_weights import LOSS_WEIGHTINGS
from megatron_eagle.data.packing import read_packs
from megatron_eagle.data.store import DataManifest, SampleStore
from megatron_eagle.errors import UserError


@dataclass
class DataConfig:
    """What a run reads.

    `seed` orders the packs; `loss_weighting` is square, token or sample, with `multi_turn` counted per
    answer; `decode_threads` read media at the same time, one step ahead of training if `prefetch`.
    """

    path: str
    length: int
    seed: int = 0
    loss_weighting: str = "square"
    multi_turn: bool = False
    decode_threads: int = 4
    prefetch: bool = True


class PackLoader:
    """The batches of one data-parallel rank.

    Pack number p of the run is that at place p % n of a permutation of the n packs, seeded by (seed, p //
    n): an epoch holds every pack once.  The packs of a global batch are shared among the ranks by cost (see
    `balance.assign`), equally many each; a rank keeps those it gets in their global order.

    Raises `UserError` for an unusable configuration, or if the pack index is missing or made for other data.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        decode_media: bool,
    ):
        if config.loss_weighting not in LOSS_WEIGHTINGS:
            raise UserError(f"data.loss_weighting must be one of {', '.join(LOSS_WEIGHTINGS)}")
        if config.decode_threads < 1:
            raise UserError(f"data.decode_threads must be at least 1, got {config.decode_threads}")
        if global_batch_size < 1 or global_batch_size % data_parallel_size:
            raise UserError(
                f"the global batch size {global_batch_size} must be a multiple of the data-parallel size "
                f"{data_parallel_size}"
            )
        self._config = config
        self._store = SampleStore(config.path, config.length)
        self._index = read_packs(self._store)
        self._global_batch_size = global_batch_size
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._media_pool = ThreadPoolExecutor(config.decode_threads, "media") if decode_media else None
        self._step_pool = ThreadPoolExecutor(1, "prefetch") if config.prefetch else None
        self._next: tuple[int, Future[list[Batch]]] | None = None
        self._permutation = lru_cache(maxsize=2)(self._permute)

    @property
    def manifest(self) -> DataManifest:
        """What the data were made with."""
        return self._store.manifest

    @property
    def packs_per_epoch(self) -> int:
        """Packs in the index."""
        return len(self._index)

    def step(self, consumed_packs: int) -> list[Batch]:
        """This rank's microbatches of the global batch that starts at `consumed_packs`.

        The following global batch is prepared in the background.  Raises `UserError` for media that have
        changed or cannot be read any more.
        """
        ready, self._next = self._next, None
        if ready is not None and ready[0] == consumed_packs:
            batches = ready[1].result()
        else:
            batches = self._load(consumed_packs)
        if self._step_pool is not None:
            following = consumed_packs + self._global_batch_size
            self._next = following, self._step_pool.submit(self._load, following)
        return batches

    def close(self) -> None:
        """Stop the background work."""
        for pool in (self._step_pool, self._media_pool):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def packs(self, consumed_packs: int) -> np.ndarray:
        """Index numbers of the packs of a global batch, in their global order."""
        places = np.arange(consumed_packs, consumed_packs + self._global_batch_size)
        epochs, places = np.divmod(places, len(self._index))
        return np.array([self._permutation(int(e))[p] for e, p in zip(epochs, places, strict=True)])

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._config.seed, epoch]).permutation(len(self._index))

    def _own(self, packs: np.ndarray) -> np.ndarray:
        """Places of this rank's packs in a global batch."""
        patches = self._index.column("n_tiles", packs) * self.manifest.patches_per_tile
        return assign(pack_costs(self._index.column("sum_squares", packs), patches), self._size)[self._rank]

    def _load(self, consumed_packs: int) -> list[Batch]:
        weighting = {"weighting": self._config.loss_weighting, "multi_turn": self._config.multi_turn}
        packs = self.packs(consumed_packs)
        total = normalizer(self._index, packs, **weighting)
        batches = [
            assemble(self._store, self._index.rows(int(pack)), total=total, **weighting)
            for pack in packs[self._own(packs)]
        ]
        if self._media_pool is not None:
            # All of the step's media are handed to the threads before the first is waited for.
            loading = [
                [
                    self._media_pool.submit(load)
                    for row in batch.sample_rows
                    for load in media_loaders(self._store, row)
                ]
                for batch in batches
            ]
            for batch, tiles in zip(batches, loading, strict=True):
                size = self.manifest.tile_size
                batch.pixel_values = torch.empty(batch.n_tiles, 3, size, size)
                if tiles:
                    torch.cat([future.result() for future in tiles], out=batch.pixel_values)
        return batches
