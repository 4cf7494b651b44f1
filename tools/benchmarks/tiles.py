"""From picture files to tiles, decoding included: ours beside Pillow and DALI on the CPU, CPU time per tile.

Photographs out of the scikit-image wheel, JPEG and PNG; 448-pixel tiles, at most 12, one thread each.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmarks.report import Report, interleaved, progress
from PIL import Image

from megatron_eagle.data.media.images import image_size, load_image
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.grids import select_grid, tile_count
from megatron_eagle.hf_model.tiles import cut_tiles, image_tiles, normalize

TILE = 448
PHOTOGRAPHS = (
    "chelsea.png",
    "coffee.png",
    "motorcycle_left.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "retina.jpg",
)
Tiler = Callable[[str, tuple[int, int]], torch.Tensor]


def ours(path: str, grid: tuple[int, int]) -> torch.Tensor:
    """What training does without a GPU."""
    return normalize(image_tiles(np.array(load_image(path)), grid, TILE))


def with_pillow(path: str, grid: tuple[int, int]) -> torch.Tensor:
    """The same tiles by Pillow's bicubic filter."""
    image = Image.open(path).convert("RGB")
    sizes = [(grid[0] * TILE, grid[1] * TILE), (TILE, TILE)]
    pictures = [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for size in sizes]
    whole, thumbnail = (torch.from_numpy(picture.transpose(2, 0, 1).copy()) for picture in pictures)
    return normalize(cut_tiles(whole, thumbnail, grid))


def dali_on_cpu() -> Tiler | None:
    """The graph that training uses on a GPU, on the CPU; None if DALI is not installed."""
    if importlib.util.find_spec("nvidia.dali") is None:
        return None
    from megatron_eagle.data.media.dali_graph import image_graph

    pipeline = image_graph(TILE, device_id=None, batch_size=1, threads=1)
    pipeline.build()

    def tiles(path: str, grid: tuple[int, int]) -> torch.Tensor:
        pipeline.feed_input("picture", [np.fromfile(path, np.uint8)])
        pipeline.feed_input("size", [np.array([grid[1] * TILE, grid[0] * TILE], np.float32)])
        whole, thumbnail = (torch.from_numpy(np.array(output[0])) for output in pipeline.run())
        return normalize(cut_tiles(whole, thumbnail, grid))

    return tiles


def run() -> Report:
    """Measure each on every photograph, then all photographs together."""
    torch.set_num_threads(1)
    tilers: dict[str, Tiler] = {"ours": ours, "Pillow": with_pillow}
    if dali := dali_on_cpu():
        tilers["DALI on the CPU"] = dali
    spent, n_tiles, rows = dict.fromkeys(tilers, 0.0), 0, []
    for path in _photographs():
        progress(path.name)
        width, height = image_size(str(path))
        grid = select_grid(width, height, tile_size=TILE, max_tiles=12)
        work = {name: partial(tiler, str(path), grid) for name, tiler in tilers.items()}
        seconds = interleaved(work)
        wanted = work["Pillow"]()
        apart = {name: (tiles() - wanted).abs().mean().item() * 127.5 for name, tiles in work.items()}
        n_tiles += tile_count(grid)
        for name in tilers:
            spent[name] += seconds[name]
            rows.append(_row(f"{path.name} {width}x{height}", tile_count(grid), name, seconds, apart[name]))
    rows += [_row("all", n_tiles, name, spent, "") for name in tilers]
    return Report("picture file to 448-pixel tiles, at most 12, one thread; median of 5", rows)


def _row(
    picture: str, tiles: int, name: str, seconds: dict[str, float], apart: float | str
) -> dict[str, str | int | float]:
    return {
        "picture": picture,
        "tiles": tiles,
        "by": name,
        "CPU ms per tile": 1000 * seconds[name] / tiles,
        "x Pillow": seconds[name] / seconds["Pillow"],
        "mean difference to Pillow of 255": apart,
    }


def _photographs() -> list[Path]:
    """Photographs of scikit-image, by name.

    Raises:
        UserError: scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UserError("the photographs are those of scikit-image: pip install scikit-image==0.26.0")
    return [Path(spec.origin).parent / "data" / name for name in PHOTOGRAPHS]
