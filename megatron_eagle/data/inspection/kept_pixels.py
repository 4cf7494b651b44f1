"""What share of a picture's pixels its tiles keep, by the most tiles that it may have."""

from collections.abc import Sequence

from megatron_eagle.hf_model.grids import kept_pixels, select_grid

TYPICAL = {
    "1080p, 1920 x 1080": (1920, 1080),
    "A4 at 300 dpi, 2480 x 3508": (2480, 3508),
    "4K, 3840 x 2160": (3840, 2160),
    "12 megapixels of a phone, 4032 x 3024": (4032, 3024),
    "panorama, 12000 x 2500": (12000, 2500),
}
LIMITS = (1, 6, 12, 24, 36, 48)


def kept_table(
    sizes: dict[str, tuple[int, int]],
    limits: Sequence[int] = LIMITS,
    *,
    tile_size: int = 448,
    tiling: str = "iap",
) -> str:
    """A Markdown table: pictures (name -> width, height), and for each limit what is kept, and the grid.

    Raises:
        ValueError: as `select_grid`.
    """
    heads = [f"{n} tile" + "s" * (n > 1) for n in limits]
    lines = [f"| picture | {' | '.join(heads)} |", "|---|" + "---:|" * len(limits)]
    for name, size in sizes.items():
        grids = [select_grid(*size, tile_size=tile_size, max_tiles=n, tiling=tiling) for n in limits]
        cells = [f"{100 * kept_pixels(*size, g, tile_size):.0f} % ({g[0]} x {g[1]})" for g in grids]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
