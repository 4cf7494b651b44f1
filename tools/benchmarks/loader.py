"""What a step's data cost a rank: planning and building a pack, decoding its share, agreeing on failures."""

import multiprocessing
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from benchmarks.report import Report, interleaved, progress
from PIL import Image

from megatron_eagle.data.loading.media_reader import Medium
from megatron_eagle.data.media.decoder import MediaDecoder
from megatron_eagle.data.store.reader import ImagePlan
from megatron_eagle.model.inputs import build_input, plan_input
from megatron_eagle.model.language import Targets
from megatron_eagle.model.presets import preset
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.resilience.failed_media import merge_marks

LENGTH, CHUNKS = 131_072, 4
RANKS, SAMPLES = 2, 1024


def run() -> Report:
    """Median milliseconds of CPU time, of wall time for the reduction."""
    rows = [*_planning(), *_decoding()]
    progress("reduction")
    rows.append({"what": f"marks of {SAMPLES:,} samples merged over {RANKS} processes", "ms": _merging()})
    return Report("data of one step on one rank", rows)


def _axis(rank: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(rank=rank, size=size, group=SimpleNamespace(rank=lambda: rank, size=lambda: size))


def _planning() -> list[dict[str, Any]]:
    """One rank of TP4 x CP8: what every model chunk repeated, and what is done once in the background."""
    progress("planning")
    eagle = preset("eagle2.5-8b").complete()
    config = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True, context_parallel_size=8)
    groups = SimpleNamespace(tp_cp=None)
    mesh: Any = SimpleNamespace(
        config=config, tp=_axis(0, 4), cp=_axis(3, 8), groups=groups, ranks_per_node=8
    )
    random, tiles = torch.Generator().manual_seed(0), 400
    ids = torch.randint(0, 1000, (LENGTH,), generator=random)
    for tile in range(tiles):
        start = tile * (LENGTH // tiles)
        ids[start : start + eagle.tokens_per_tile] = eagle.image_token_index
    bounds = [0, *sorted(np.random.default_rng(0).choice(LENGTH, 20, replace=False).tolist()), LENGTH]
    plan = partial(plan_input, eagle, mesh, input_ids=ids, document_bounds=bounds, num_tiles=tiles)
    targets = Targets(ids, ids.float(), ids)
    ready = plan_input(eagle, mesh, input_ids=ids, document_bounds=bounds, num_tiles=None)
    build = partial(
        build_input,
        ready,
        torch.device("cpu"),
        input_ids=ids,
        position_ids=ids,
        tiles=None,
        targets=targets,
    )
    spent = interleaved({"plan": plan, "build": build})
    pack = f"pack of {LENGTH:,} tokens and {tiles} tiles, TP4 x CP8"
    return [
        {"what": f"plan of a {pack}: once, in the background", "ms": 1e3 * spent["plan"]},
        {"what": f"the same, as often as {CHUNKS} model chunks asked", "ms": 1e3 * CHUNKS * spent["plan"]},
        {"what": "its tokens on the device: once, in the step", "ms": 1e3 * spent["build"]},
    ]


def _decoding() -> list[dict[str, Any]]:
    """Twelve photographs of twelve tiles: all of them, and the share of a rank of CP2 and of TP2 x CP2."""
    progress("decoding")
    decoder = MediaDecoder("exact", tile_size=448)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "picture.jpg")
        noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
        Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC).save(file)
        plan = ImagePlan(str(file), file.stat().st_size, 0, 1600, 1200, columns=4, rows=3)
        media = [Medium(plan, 10**8, row, "") for row in range(12)]
        total = sum(medium.n_tiles for medium in media)

        def read(tiles: range) -> None:
            start = 0
            for medium in media:
                wanted = range(
                    max(start, tiles.start) - start, min(start + medium.n_tiles, tiles.stop) - start
                )
                if wanted:
                    medium.load(decoder, wanted)
                start += medium.n_tiles

        shares = {f"{total // n} of {total} tiles of 12 pictures": range(total // n) for n in (1, 2, 4)}
        # In the calling thread, whose time is what is measured.
        spent = interleaved({name: partial(read, tiles) for name, tiles in shares.items()}, repeats=3)
    return [{"what": f"decoding {name}", "ms": 1e3 * seconds} for name, seconds in spent.items()]


def _merging() -> float:
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("fork")
        results = context.SimpleQueue()
        ranks = [context.Process(target=_merge, args=(rank, folder, results)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        return float(results.get())


def _merge(rank: int, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        merge_marks(SAMPLES, {}, None, None)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        results.put(1e3 * median(seconds[20:]))
    dist.barrier()
    dist.destroy_process_group()
