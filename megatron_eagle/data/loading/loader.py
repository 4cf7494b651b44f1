"""The order of packs, and batches ready when they are asked for.

The whole state is one integer, the number of packs consumed.  Which packs a global batch holds depends on
nothing but the data, the seed and that number, also where the data are still being made (see `follow`); only
who gets which of them depends on the data-parallel layout: the ranks share a global batch so that all have
about the same to do.
"""

import itertools
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Event
from typing import Annotated, Generic, Literal, TypedDict

import numpy as np
import torch

from megatron_eagle.data.loading.batch import assemble, join, normalizer, sample_weight, token_weights
from megatron_eagle.data.loading.follow import FollowConfig, FollowedPacks, Read
from megatron_eagle.data.loading.identity import DataIdentity, identify
from megatron_eagle.data.loading.loss_weights import LOSS_WEIGHTINGS
from megatron_eagle.data.loading.media_reader import MediaReader
from megatron_eagle.data.loading.packs import (
    FailedMedium,
    GlobalBatch,
    LoadedPack,
    P,
    PlannedBatch,
    PlannedPack,
    TokenPack,
)
from megatron_eagle.data.loading.prefetch import Prefetcher
from megatron_eagle.data.media.decoder import MediaDecoder
from megatron_eagle.data.media.remote.files import MediaAccess
from megatron_eagle.data.media.remote.settings import RemoteSettings
from megatron_eagle.data.packing.balance import deal, pack_costs
from megatron_eagle.data.packing.index import PackIndex, read_packs
from megatron_eagle.data.store.manifest import DataManifest
from megatron_eagle.data.store.reader import Rows, SampleStore
from megatron_eagle.data.store.shards import ShardStore, store_folder
from megatron_eagle.errors import UserError
from megatron_eagle.ranges import Range, Ranged


@dataclass
class DataConfig(Ranged):
    """What a run reads.

    `seed` orders the packs; `loss_weighting` is square, token or sample, with `multi_turn` counted per
    answer.  `decode_threads` read media at the same time; with `prefetch` while training computes, at least
    one global batch ahead, and more as long as those that wait hold at most `prefetch_bytes` on a rank.

    `decoder` is exact, dali, or auto (see `data.media.decoder`). `on_media_error`: a picture or video that
    can no longer be read, or not within `decode_timeout_s` seconds, ends the run (`error`), or its sample
    goes without weight in the loss (`skip`). `remote` says from where media may be fetched.
    """

    path: str  # folder of the token store; also while it is made
    length: Annotated[int, Range(1, 2**31 - 1)]  # tokens per pack; the store has packs of it
    # A microbatch is so many packs, end to end, over so many times context_parallel_size ranks: their work is
    # then more equal. Order, global batches and loss do not depend on it.
    packs_per_sequence: Annotated[int, Range(1, 1024)] = 1
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    loss_weighting: str = "square"
    multi_turn: bool = False
    decode_threads: Annotated[int, Range(1, 1024)] = 4
    prefetch: bool = True
    prefetch_bytes: Annotated[int, Range(0, 10**13)] = 4_000_000_000
    decoder: Literal["auto", "exact", "dali"] = "auto"
    on_media_error: Literal["error", "skip"] = "error"
    decode_timeout_s: Annotated[float, Range(0.1, 86_400)] = 120.0
    # Read window by window, also while preprocessing makes it; null: a complete store, which is packed.
    follow: FollowConfig | None = None
    remote: RemoteSettings = RemoteSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_weighting not in LOSS_WEIGHTINGS:
            raise UserError(f"data.loss_weighting must be one of {', '.join(LOSS_WEIGHTINGS)}")

    @property
    def sequence_length(self) -> int:
        """Tokens of a microbatch."""
        return self.length * self.packs_per_sequence

    @property
    def folder(self) -> Path:
        """Where the store lies now."""
        return Path(self.path) if self.follow is None else store_folder(self.path)


_WAIT_SECONDS = 0.2  # between two questions whether a batch that waits for a window is there


class _Weighting(TypedDict):
    """What all loss weights are formed with."""

    weighting: str
    multi_turn: bool


class PackLoader(Generic[P]):
    """The batches of one data-parallel rank, `packs_per_sequence` packs end to end in each microbatch.

    Pack number p of the run is that at place p % n of a permutation of the n packs, seeded by (seed, p //
    n): an epoch holds every pack once.  A store that is followed has an order of its own (see `follow`).  The
    packs of a global batch are shared among the ranks by cost (see `balance.deal`), equally many each; a
    rank keeps those it gets in their global order.

    `plan` derives from a pack's tokens what this rank does with it, and so which tiles it decodes; it runs in
    the background too.  `patch_cost` is the model's (`model.flops.patch_cost`); 0: packs are shared by
    attention alone.  For a CUDA `device` tensors lie in pinned memory, so that nobody waits for their copies.

    Raises:
        UserError: an unusable configuration, or if the pack index is missing or made for other data.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        plan: Callable[[TokenPack], P],
        patch_cost: float = 0.0,
        device: str | torch.device = "cpu",
    ):
        at_once = data_parallel_size * config.packs_per_sequence
        if global_batch_size < 1 or global_batch_size % at_once:
            several = (
                f" x {config.packs_per_sequence} packs a sequence" if at_once > data_parallel_size else ""
            )
            raise UserError(
                f"the global batch size {global_batch_size} must be a multiple of the data-parallel size "
                f"{data_parallel_size}{several}"
            )
        self._config = config
        self._store, self._index = open_packs(config)
        self._global_batch_size, self._patch_cost = global_batch_size, patch_cost
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._plan, self._pin_memory = plan, torch.device(device).type == "cuda"
        self._weighting = _Weighting(weighting=config.loss_weighting, multi_turn=config.multi_turn)
        self._decoder = MediaDecoder(
            config.decoder,
            tile_size=self.manifest.tile_size,
            device=device,
            timeout=config.decode_timeout_s,
            files=MediaAccess(config.remote),
        )
        self._media = MediaReader(
            self._store, self._decoder, config.decode_threads, pin_memory=self._pin_memory
        )
        self._ahead: Prefetcher[PlannedBatch[P], GlobalBatch[P]] | None = None
        self._ahead_from = 0  # packs consumed before the next batch that `_ahead` gives
        self._permutation = lru_cache(maxsize=2)(self._permute)
        self._closing = Event()

    @property
    def store(self) -> Rows:
        """The rows that packs are made of."""
        return self._store

    @property
    def manifest(self) -> DataManifest:
        """What the data were made with."""
        return self._store.manifest

    @property
    def datasets(self) -> list[str]:
        """Names of the mixture's data sets, by their numbers in `TokenPack.group_ids`."""
        return self.manifest.datasets

    @property
    def followed(self) -> FollowedPacks | None:
        """The packs of a store that is followed."""
        return self._index if isinstance(self._index, FollowedPacks) else None

    def identity(self, first_pack: int) -> DataIdentity:
        """What the global batch that starts at `first_pack` is read from, and in which order."""
        if self.followed is None:
            return self._identity
        read = self.followed.read(first_pack, first_pack + self._global_batch_size - 1)
        return followed_identity(self._config, read)

    @cached_property
    def _identity(self) -> DataIdentity:
        config = self._config
        assert isinstance(self._store, SampleStore) and isinstance(self._index, PackIndex)
        return identify(
            self._store,
            self._index,
            seed=config.seed,
            loss_weighting=config.loss_weighting,
            multi_turn=config.multi_turn,
        )

    @property
    def decoder(self) -> str:
        """How media are decoded, and why."""
        return f"media: {self._decoder.name} ({self._decoder.reason})"

    @property
    def packs_per_epoch(self) -> int:
        """Packs in the index; of a store that is followed, those found so far."""
        return len(self._index)

    def go_on(self, data: DataIdentity, first_pack: int, count: int) -> None:
        """Begin, in a store that is followed, at a batch that was read before: packs `first_pack` and so on.

        Raises:
            UserError: it was read in another order.
        """
        assert self.followed is not None, "it is followed"
        read = Read(data.window, data.window_start, data.store, data.packs)
        weighting, multi_turn = self._config.loss_weighting, self._config.multi_turn
        then = replace(data, loss_weighting=weighting, multi_turn=multi_turn)  # these change no order
        changed = then.difference(followed_identity(self._config, read))
        if changed is not None:
            raise UserError(
                f"{self._config.path}: not in the order in which this run has read it ({changed})"
            )
        self.followed.go_on(read, first_pack, first_pack + count - 1)

    def need(self, consumed_packs: int) -> None:
        """Nothing, where the global batch that starts at `consumed_packs` can be read.

        Raises:
            UserError: its window is not there yet.
        """
        end = consumed_packs + self._global_batch_size
        if self.followed is not None and not self.followed.reach(end):
            raise UserError(f"packs {consumed_packs} to {end - 1} need {self.followed.awaited()}")

    def step(self, consumed_packs: int) -> GlobalBatch[P]:
        """This rank's share of the global batch that starts at `consumed_packs`.

        Those that follow are prepared in the background.  Media that cannot be read are zeros, and named in
        `failures`.

        Raises:
            UserError: a damaged store or a pack that `plan` refuses.
        """
        if not self._config.prefetch:
            return self._read_media(self._prepare(consumed_packs))
        if self._ahead is None or self._ahead_from != consumed_packs:
            self._stop_prefetch()
            self._ahead = Prefetcher(
                self._prepare,
                self._read_media,
                self._positions(consumed_packs),
                limit=self._config.prefetch_bytes,
            )
        self._ahead_from = consumed_packs + self._global_batch_size
        try:
            return self._ahead.take()
        except BaseException:
            self._stop_prefetch()
            raise

    def close(self) -> None:
        """Stop the background work."""
        self._media.close()
        self._stop_prefetch()
        self._decoder.close()

    def packs(self, consumed_packs: int) -> np.ndarray:
        """Index numbers of the packs of a global batch, in their global order."""
        places = np.arange(consumed_packs, consumed_packs + self._global_batch_size)
        if self.followed is not None:
            return places
        epochs, places = np.divmod(places, len(self._index))
        return np.array([self._permutation(int(e))[p] for e, p in zip(epochs, places, strict=True)])

    def samples(self, consumed_packs: int) -> list[tuple[int, int]]:
        """The samples of a global batch in the order of their numbers: number of the pack, store row."""
        packs = [int(pack) for pack in self.packs(consumed_packs)]
        return [(pack, row) for pack in packs for row in self._index.rows(pack)]

    def alone(
        self, batch: GlobalBatch[P], number: int, length: int
    ) -> tuple[LoadedPack[P], dict[int, FailedMedium]]:
        """A sample of this rank, by its number in the global batch, as a pack of `length` tokens by itself.

        It weighs what it weighs in the global batch.  Beside it, by its number: what of its media cannot be
        read.
        """
        _, row = self.samples(batch.first_pack)[number]
        tokens = self._assemble([row], batch.total, number, length)
        [pack], failures = self._media.read([self._planned(tokens)])
        return pack, failures

    def n_samples(self, consumed_packs: int) -> int:
        """Samples of a global batch; they are numbered from 0 in the order of its packs."""
        return int(self._index.column("n_samples", self.packs(consumed_packs)).sum())

    def leave_out(self, batch: GlobalBatch[P], samples: Collection[int]) -> GlobalBatch[P]:
        """The batch in which samples, by their numbers in the whole global batch, have no weight and no
        pixels.

        The other samples' weights are then exactly those of a global batch in which these never had any. The
        batch that is given is used up: both share their pixels.
        """
        rows = enumerate(row for _, row in self.samples(batch.first_pack))
        kept = [self._store[row] for number, row in rows if number not in samples]
        total = math.fsum(sample_weight(sample, **self._weighting) for sample in kept)
        microbatches = []
        for pack in batch.microbatches:
            weights = token_weights(
                self._store,
                pack.samples,
                len(pack.input_ids),
                total=total,
                left_out=samples,
                **self._weighting,
            )
            microbatches.append(replace(pack, loss_weights=self._pinned(weights)))
            self._media.blank(pack, samples)
        return replace(batch, microbatches=microbatches, total=total)

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._config.seed, epoch]).permutation(len(self._index))

    def _own(self, packs: np.ndarray) -> list[np.ndarray]:
        """This rank's microbatches: the places of their packs in a global batch."""
        patches = self._index.column("n_tiles", packs) * self.manifest.patches_per_tile
        costs = pack_costs(self._index.column("sum_squares", packs), patches, self._patch_cost)
        return deal(costs, self._size, self._config.packs_per_sequence)[self._rank]

    def _prepare(self, consumed_packs: int) -> PlannedBatch[P]:
        self.need(consumed_packs)
        packs = self.packs(consumed_packs)
        total = normalizer(self._index, packs, **self._weighting)
        counts = self._index.column("n_samples", packs)
        first_samples = counts.cumsum() - counts
        planned = [
            self._planned(
                join(
                    [
                        self._assemble(self._index.rows(int(packs[i])), total, int(first_samples[i]))
                        for i in places
                    ]
                )
            )
            for places in self._own(packs)
        ]
        tiles = sum(len(pack.plan.tiles or ()) for pack in planned)
        nbytes = sum(pack.nbytes for pack in planned) + tiles * 3 * self.manifest.tile_size**2
        return PlannedBatch(consumed_packs, planned, total, nbytes)

    def _assemble(
        self, rows: list[int], total: float, first_sample: int, length: int | None = None
    ) -> TokenPack:
        return assemble(
            self._store, rows, total=total, first_sample=first_sample, length=length, **self._weighting
        )

    def _planned(self, tokens: TokenPack) -> PlannedPack[P]:
        try:
            plan = self._plan(tokens)
        except UserError as error:
            raise UserError(f"the pack of store rows {tokens.sample_rows}: {error}") from None
        tokens = tokens.pin_memory() if self._pin_memory else tokens
        return PlannedPack(**vars(tokens), plan=plan)

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if self._pin_memory else tensor

    def _read_media(self, planned: PlannedBatch[P]) -> GlobalBatch[P]:
        microbatches, failures = self._media.read(planned.packs)
        return GlobalBatch(planned.first_pack, microbatches, planned.total, failures)

    def _positions(self, consumed_packs: int) -> Iterator[int]:
        """The starts of global batches, each when its packs are there."""
        for position in itertools.count(consumed_packs, self._global_batch_size):
            while self.followed is not None and not self.followed.reach(position + self._global_batch_size):
                if self._closing.wait(_WAIT_SECONDS):
                    return
            yield position

    def _stop_prefetch(self) -> None:
        if self._ahead is not None:
            self._closing.set()
            self._ahead.close()
            self._closing.clear()
            self._ahead = None


def open_packs(config: DataConfig) -> tuple[Rows, PackIndex | FollowedPacks]:
    """What a run reads: its rows and its packs.

    Raises:
        UserError: no store, or none that is packed or can be followed.
    """
    if config.follow is None:
        complete = SampleStore(config.path, config.length)
        return complete, read_packs(complete)
    store = ShardStore(config.path, config.length)
    return store, FollowedPacks(store, config.follow, config.seed)


def followed_identity(config: DataConfig, read: Read) -> DataIdentity:
    """The identity of a batch of a store that is followed."""
    assert config.follow is not None, "it is followed"
    return DataIdentity(
        path=config.path,
        length=config.length,
        seed=config.seed,
        loss_weighting=config.loss_weighting,
        multi_turn=config.multi_turn,
        store=read.store,
        packs=read.packs,
        shards_per_window=config.follow.shards_per_window,
        window=read.window,
        window_start=read.window_start,
    )
