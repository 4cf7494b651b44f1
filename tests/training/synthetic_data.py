"""A loader of made-up packs, so that the training loop is tested without media, tokenizer or store."""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import torch

from megatron_eagle.data.loading.batch import join
from megatron_eagle.data.loading.identity import DataIdentity
from megatron_eagle.data.loading.loader import DataConfig
from megatron_eagle.data.loading.packs import GlobalBatch, LoadedPack, PackedSample, TokenPack
from megatron_eagle.data.store.manifest import DataManifest
from megatron_eagle.model.inputs import InputPlan
from megatron_eagle.model.presets import preset

LENGTH = 64
IMAGE_TOKEN = 7
VOCABULARY = 504


def write_manifest(folder: Path) -> None:
    """What of a token store is read besides its packs: the manifest and a tokenizer folder."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    eagle = preset("tiny")
    DataManifest(
        fingerprint="synthetic",
        template="hf",
        tile_size=eagle.vision.image_size,
        patch_size=eagle.vision.patch_size,
        tokens_per_tile=eagle.tokens_per_tile,
        vocab_size=VOCABULARY,
        image_token_id=IMAGE_TOKEN,
        pad_token_id=0,
        lengths=[LENGTH],
        sources=[],
        sampling={"max_tiles": 4},
        max_pixels=0,
    ).save(folder)


DATASETS = ["even", "odd", "absent"]


class SyntheticLoader:
    """A `data.loading.packs.BatchLoader`. A pack depends on its global position alone; every third has no
    image. Data in a folder named `broken`: the weights of the third iteration's packs are NaN."""

    packs_per_epoch = 9

    def __init__(
        self,
        config: DataConfig,
        *,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        plan: Callable[[TokenPack], InputPlan],
        patch_cost: float = 0.0,
        device: torch.device,
    ) -> None:
        self._broken = Path(config.path).name == "broken"
        self._batch, self._plan = global_batch_size, plan
        self._rank, self._share = data_parallel_rank, global_batch_size // data_parallel_size
        self._packs = config.packs_per_sequence
        self.decoder, self.datasets = "media: made up", DATASETS
        self.identity = lambda first_pack: DataIdentity(
            config.path, LENGTH, config.seed, "square", False, "made", "up"
        )

    def step(self, consumed_packs: int) -> GlobalBatch[InputPlan]:
        total = sum(float(self.weights(consumed_packs + i).sum()) for i in range(self._batch))
        if self._broken and consumed_packs == 2 * self._batch:
            total = float("nan")
        mine = range(self._rank * self._share, (self._rank + 1) * self._share, self._packs)
        return GlobalBatch(consumed_packs, [self._loaded(consumed_packs, i, total) for i in mine], total)

    def n_samples(self, consumed_packs: int) -> int:
        return self._batch

    def leave_out(self, batch: GlobalBatch[InputPlan], samples: Collection[int]) -> GlobalBatch[InputPlan]:
        kept = [i for i in range(self._batch) if i not in samples]
        total = sum(float(self.weights(batch.first_pack + i).sum()) for i in kept)
        packs = []
        for pack in batch.microbatches:
            weights = [
                self.weights(batch.first_pack + sample.number) * (sample.number in kept)
                for sample in pack.samples
            ]
            packs.append(replace(pack, loss_weights=torch.cat(weights) / (total or 1)))
        return replace(batch, microbatches=packs, total=total)

    def _loaded(self, consumed_packs: int, first: int, total: float) -> LoadedPack[InputPlan]:
        packs, tiles = [], []
        for number in range(first, first + self._packs):
            tokens, pixels = self._pack(consumed_packs + number)
            tokens.loss_weights.div_(total)
            samples = [replace(sample, number=number) for sample in tokens.samples]
            packs.append(replace(tokens, samples=samples))
            tiles.append(pixels)
        tokens, pixels = join(packs), torch.cat(tiles)
        plan = self._plan(tokens)
        mine = None if plan.tiles is None else pixels[plan.tiles.start : plan.tiles.stop]
        return LoadedPack(**vars(tokens), plan=plan, pixel_values=mine)

    @classmethod
    def weights(cls, position: int) -> torch.Tensor:
        """Of a pack, by its global position, before the normaliser."""
        return cls._pack(position)[0].loss_weights

    def close(self) -> None:
        pass

    @staticmethod
    def _pack(position: int) -> tuple[TokenPack, torch.Tensor]:
        eagle = preset("tiny")
        generator = torch.Generator().manual_seed(position)
        ids = torch.randint(8, 24, (LENGTH,), generator=generator)  # few tokens: soon learned
        tiles = position % 3
        ids[3 : 3 + tiles * eagle.tokens_per_tile] = IMAGE_TOKEN
        labels = torch.cat([ids[1:], ids[:1]])
        weights = torch.rand(LENGTH, generator=generator) * (labels != IMAGE_TOKEN)
        weights[[39, LENGTH - 1]] = 0
        size = eagle.vision.image_size
        shape = tiles, 3, size, size
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        tokens = TokenPack(
            input_ids=ids,
            labels=labels,
            loss_weights=weights,
            group_ids=torch.full((LENGTH,), position % 2),
            position_ids=torch.cat([torch.arange(40), torch.arange(LENGTH - 40)]),
            document_bounds=[0, 40, LENGTH],
            n_tiles=tiles,
            samples=[PackedSample(0, position, 0, 40)],
        )
        return tokens, pixels
