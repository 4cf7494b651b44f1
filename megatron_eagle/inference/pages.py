"""Pages of PDF files as pictures for a model, drawn at the size that training draws them at."""

from PIL import Image

from megatron_eagle.data.media.documents import draw_page, page_sizes, pixel_size
from megatron_eagle.data.media.source import PageRef
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.grids import select_grid
from megatron_eagle.problems import Problem

MAX_PIXELS = 100_000_000  # of one picture on a page


def page_pictures(
    path: str, *, tile_size: int = 448, max_tiles: int = 12, tiling: str = "iap", max_pages: int | None = None
) -> list[Image.Image]:
    """Every page, RGB, of exactly the pixels of its grid of tiles; the processor then chooses the same grid,
    and nothing is resized.

    Raises:
        UserError: no PDF file, damaged, encrypted, or more than `max_pages` pages; the message names it.
    """
    try:
        sizes = page_sizes(path)
        if max_pages is not None and len(sizes) > max_pages:
            raise UserError(f"{path} has {len(sizes)} pages, the limit is {max_pages} (--max-pages)")
        pages = []
        for number, size in enumerate(sizes):
            shape = pixel_size(*size, max_tiles * tile_size**2)
            columns, rows = select_grid(
                *shape, tile_size=tile_size, max_tiles=max_tiles, tiling=tiling, drawn=True
            )
            page = PageRef(path, number, columns * tile_size, rows * tile_size)
            pages.append(draw_page(page, max_pixels=MAX_PIXELS))
        return pages
    except Problem as problem:
        raise UserError(str(problem)) from None
