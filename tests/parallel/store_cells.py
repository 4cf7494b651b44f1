"""Training's own path from a token store to gradients, on any layout: loader, policy, plan, schedule.

A global batch of four packs, in which sample `BAD` is a picture of several tiles that no other sample shows.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from megatron_eagle.data.loading.loader import DataConfig, PackLoader
from megatron_eagle.data.loading.media_reader import Medium
from megatron_eagle.data.packing.index import write_packs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.runtime.parallel import Mesh, ParallelConfig, model_parallel
from megatron_eagle.training.optimizer import wrap_models
from megatron_eagle.training.resilience.failed_media import host_group, next_batch
from megatron_eagle.training.schedule import build_batch, plan_batch, run_schedule
from tests.data.helpers import conversation, every_tile, make_image, make_store, make_tokenizer, make_video
from tests.parallel.cases import collect, tiny_model

LENGTH, PACKS = 160, 4
CPU = torch.device("cpu")
BAD = "bad.png"


def write_store(folder: Path) -> Path:
    """Pictures of several tiles, clips, text."""
    for name, size in (("a.png", (112, 56)), ("b.png", (20, 20)), (BAD, (84, 84))):
        make_image(folder / name, size, seed=len(name))
    make_video(folder / "v.mp4", 40)
    kinds = [
        conversation("Hi", "Yes, and no."),
        conversation("<image-2> or <image-1>?", "Both of them.", image=["a.png", "b.png"]),
        conversation("<video>", "A clip.", video="v.mp4"),
    ]
    records = [*kinds * 3, conversation("<image>", "Lost.", image=BAD)]
    sampling = {"min_frames": 3, "fps": 1}
    store = make_store(folder, make_tokenizer(folder / "tokenizer"), records, (LENGTH,), sampling=sampling)
    write_packs(store, LENGTH, seed=0)
    return store


def model_for(store: str) -> EagleConfig:
    """The tiny model with the store's tiles and tokens."""
    manifest, eagle = SampleStore(store).manifest, tiny_model()
    eagle.vision.image_size, eagle.vision.patch_size = manifest.tile_size, manifest.patch_size
    eagle.text.vocab_size, eagle.image_token_index = manifest.vocab_size, manifest.image_token_id
    return eagle.validate()


def open_loader(store: str, rank: int = 0, size: int = 1, plan=every_tile, **config) -> PackLoader:
    return PackLoader(
        DataConfig(store, LENGTH, prefetch=False, **config),
        global_batch_size=PACKS,
        data_parallel_rank=rank,
        data_parallel_size=size,
        plan=plan,
    )


def run_cells(store: str, cells: list[dict]) -> list[dict]:
    """On each rank: `run_cell` for one layout after the other."""
    return [run_cell(store, parallel) for parallel in cells]


def run_cell(store: str, parallel: dict, packs: int = 1) -> dict:
    """On each rank: forward and backward of the first global batch, `packs` packs in each microbatch, with
    failed media left out.

    Beside what `cases.collect` gives: `packs`, per microbatch of this rank the loss weights of its packs by
    the number of their first sample, the first of its decoded tiles and these tiles; `decoded`, tiles asked
    for by file; `failed`, by path where their samples begin in this rank's microbatches.
    """
    eagle, decoded = model_for(store), Counter()
    with model_parallel(ParallelConfig(**parallel).joined(packs)) as mesh:
        models = build_model(eagle, mesh, CPU)
        initialize_parameters(models, seed=1)
        wrapped = wrap_models(models)
        plan = partial(plan_batch, eagle, mesh, False)
        loader = open_loader(store, mesh.dp.rank, mesh.dp.size, plan, packs_per_sequence=packs)
        with patch.object(Medium, "load", _counting(decoded)):
            batch, failed = next_batch(loader, 0, "skip", host_group())
        loader.close()
        result = run_packs(wrapped, mesh, models, batch.microbatches)
        result["packs"] = [
            {
                "loss_weights": {
                    min(s.number for s in pack.samples if s.start // LENGTH == place): weights
                    for place, weights in enumerate(pack.loss_weights.split(LENGTH))
                },
                "first_tile": None if pack.plan.tiles is None else pack.plan.tiles.start,
                "tiles": pack.pixel_values,
            }
            for pack in batch.microbatches
        ]
        starts = {s.number: s.start for pack in batch.microbatches for s in pack.samples}
        lost = {medium.path: starts.get(number) for number, medium in failed.items()}
        return result | {"decoded": dict(decoded), "failed": lost}


def run_packs(wrapped: list, mesh: Mesh, models: list, packs: list) -> dict:
    """Forward and backward of planned packs."""
    for model in wrapped:
        model.zero_grad_buffer()
    length = len(packs[0].input_ids)
    part = run_schedule(wrapped, mesh, packs, partial(build_batch, CPU), length=length)
    return collect(mesh, models, wrapped, part.item())


def run_reference(store: str, without: str | None) -> dict:
    """In one process, with all media at hand: the sample that shows the file `without` weighs nothing from
    the start."""
    eagle, samples = model_for(store), SampleStore(store)
    loader = open_loader(store)
    packs = loader.step(0).microbatches
    loader.close()
    kept = [
        [
            not any(Path(image.path).name == without for image in samples[row].images)
            for row in pack.sample_rows
        ]
        for pack in packs
    ]
    # From the definition: every supervised token weighs 1 / sqrt(n), all divided by their sum.
    lengths = [[int((samples[row].answers > 0).sum()) for row in pack.sample_rows] for pack in packs]
    total = sum(
        n**0.5 for pack, keep in zip(lengths, kept, strict=True) for n, k in zip(pack, keep, strict=True) if k
    )
    with model_parallel(ParallelConfig()) as mesh:
        weighted = []
        for pack, keep, of_pack in zip(packs, kept, lengths, strict=True):
            weights = torch.zeros(LENGTH, dtype=torch.float64)
            for i, (row, start) in enumerate(zip(pack.sample_rows, pack.document_bounds, strict=False)):
                supervised = torch.from_numpy(samples[row].answers[1:] > 0)
                if keep[i]:
                    weights[start : start + len(supervised)] = supervised * of_pack[i] ** -0.5 / total
            plan = plan_batch(eagle, mesh, False, pack)
            weighted.append(replace(pack, plan=plan, loss_weights=weights.float()))
        models = build_model(eagle, mesh, CPU)
        initialize_parameters(models, seed=1)
        result = run_packs(wrap_models(models), mesh, models, weighted)
    result["packs"] = [{"loss_weights": pack.loss_weights, "tiles": pack.pixel_values} for pack in weighted]
    return result


def _counting(decoded: Counter):
    load = Medium.load

    def counted(medium, decoder, tiles=None):
        decoded[Path(medium.plan.path).name] += len(tiles)
        return load(medium, decoder, tiles)

    return counted
