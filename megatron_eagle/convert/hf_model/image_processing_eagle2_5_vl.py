"""Pictures and video frames to tiles for Eagle 2.5: Image Area Preservation (paper, section 3.2).

Self-contained: shipped inside every exported checkpoint and loaded with `trust_remote_code`
(transformers 4.51 to 5.x). The same arithmetic, resize and normalisation as in training: equal pixels in,
equal tiles out. Shapes: n tiles, S tile side in pixels.
"""

import contextlib
import struct

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BatchFeature
from transformers.utils import TensorType

try:  # transformers 4.51 does not offer it at the top level when torchvision is absent
    from transformers import ImageProcessingMixin
except ImportError:
    from transformers.image_processing_base import ImageProcessingMixin

# Among candidates of equal area the first wins a tie, which happens for (nearly) square pictures and for 2:1.
# The released model was trained with this order: by largest tile count N, in three groups, the columns of the
# candidates of each area (their maximum). Areas not listed, and every N outside `_LISTED`, go by columns.
_LISTED = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 18, 20, 24, 32, 36))
_UP_TO_7 = "3 1, 4 1 2, 6 2 1 3, 7 1"
_UP_TO_20 = (
    "3 1, 2 4 1, 5 1, 1 6 3 2, 7 1, 4 2 1 8, 2 5 10 1, 11 1, 12 3 4 1 6 2, 13 1, 14 2 1 7, 1 5 15 3, "
    "1 2 16 8 4, 9 1 18 3 2 6, 5 20 4 10 2 1"
)
_UP_TO_36 = (
    "3 1, 2 4 1, 5 1, 6 3 2 1, 7 1, 4 2 1 8, 9 3 1, 1 5 10 2, 6 1 2 12 3 4, 13 1, 14 1 7 2, 1 5 3 15, "
    "8 16 4 1 2, 18 3 9 1 6 2, 20 5 2 1 4 10, 7 1 3 21, 2 11 22 1, 1 24 6 3 4 2 8 12, 5 1 25, 1 2 13 26, "
    "9 27 3 1, 1 7 14 2 4 28, 29 1, 3 15 1 2 10 5 30 6, 8 1 4 32 16 2, 1 33 3 11, 34 17 2 1, 35 1 7 5, "
    "4 6 3 18 12 36 1 9 2"
)


def grid_candidates(max_tiles: int, min_tiles: int = 1) -> list[tuple[int, int]]:
    """Grids (columns, rows) of `min_tiles` to `max_tiles` tiles, in the order in which they are tried."""
    table = _UP_TO_7 if max_tiles < 8 else _UP_TO_20 if max_tiles < 24 else _UP_TO_36
    orders = [[int(c) for c in entry.split()] for entry in table.split(",")] if max_tiles in _LISTED else []
    listed = {max(order): order for order in orders}
    grids = []
    for area in range(min_tiles, max_tiles + 1):
        ascending = [c for c in range(1, area + 1) if area % c == 0]
        grids += [(c, area // c) for c in listed.get(area, ascending)]
    return grids


def select_grid(
    width: int, height: int, tile_size: int, max_tiles: int, min_tiles: int = 1, tiling: str = "iap"
) -> tuple[int, int]:
    """Grid (columns, rows) for a picture: keeps its area (up to 60 %) and its aspect ratio.

    `tiling` "aspect": the closest aspect ratio, of equal ones the last with less than twice the pixels.
    float64, in exactly this order of operations: exact arithmetic chooses differently for some sizes.
    """
    aspect = width / height
    best, best_score = (1, 1), float("-inf")
    for columns, rows in grid_candidates(max_tiles, min_tiles):
        target = columns / rows
        coverage = (columns * rows * tile_size * tile_size) / (width * height)
        if tiling == "aspect":
            score = -abs(aspect - target)
            better = score > best_score or (score == best_score and coverage < 2)
        else:
            score = min(coverage, 0.6) * min(target / aspect, aspect / target)
            better = score > best_score
        if better:
            best, best_score = (columns, rows), score
    return best


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright (EXIF orientation) RGB; transparency over white, 16-bit grey by its upper eight bits."""
    # A broken EXIF block says nothing of the picture itself.
    with contextlib.suppress(SyntaxError, ValueError, struct.error):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's own conversion clips to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba.getchannel("A"))
    return image.convert("RGB")


def to_pixels(image) -> torch.Tensor:
    """PIL image, or uint8 array or tensor [H, W, 3], as a uint8 tensor [3, H, W].

    Raises:
        TypeError: anything else.
    """
    if isinstance(image, Image.Image):
        array = np.array(to_rgb(image))
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        array = np.asarray(image)
    else:
        raise TypeError(f"an image must be a PIL image or an array, got {type(image).__name__}")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise TypeError(f"an image array must be uint8 [height, width, 3], got {array.dtype} {array.shape}")
    return torch.from_numpy(np.ascontiguousarray(array)).permute(2, 0, 1)


def resize(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bicubic, antialiased, on uint8: [3, H, W] -> [3, height, width]; the aspect ratio is not kept."""
    size = (height, width)
    return torch.nn.functional.interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0]


class Eagle2_5_VLImageProcessor(ImageProcessingMixin):
    """Cuts pictures into tiles and resizes video frames, one tile each.

    Args:
        size: `{"height": S, "width": S}`, the tile.
        rescale_factor, image_mean, image_std: normalisation `(x * rescale_factor - mean) / std`.
        min_dynamic_tiles, max_dynamic_tiles: cells of the grid of a picture.
        use_thumbnail: append the whole picture as one more tile, last, when the grid has several cells.
        tiling: the rule of `select_grid`.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size=None,
        rescale_factor=1 / 255,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        min_dynamic_tiles=1,
        max_dynamic_tiles=12,
        use_thumbnail=True,
        tiling="iap",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.size = dict(size or {"height": 448, "width": 448})
        if self.size.get("height") != self.size.get("width"):
            raise ValueError(f"tiles are square: size must hold equal height and width, got {self.size}")
        self.rescale_factor = rescale_factor
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.min_dynamic_tiles = min_dynamic_tiles
        self.max_dynamic_tiles = max_dynamic_tiles
        self.use_thumbnail = use_thumbnail
        self.tiling = tiling

    def tile_image(
        self, image, min_dynamic_tiles=None, max_dynamic_tiles=None, use_thumbnail=None
    ) -> torch.Tensor:
        """uint8 tiles [n, 3, S, S] of one picture, row-major, the thumbnail last."""
        pixels, side = to_pixels(image), self.size["height"]
        columns, rows = select_grid(
            pixels.shape[2],
            pixels.shape[1],
            tile_size=side,
            max_tiles=self.max_dynamic_tiles if max_dynamic_tiles is None else max_dynamic_tiles,
            min_tiles=self.min_dynamic_tiles if min_dynamic_tiles is None else min_dynamic_tiles,
            tiling=self.tiling,
        )
        whole = resize(pixels, rows * side, columns * side)
        tiles = whole.reshape(3, rows, side, columns, side).permute(1, 3, 0, 2, 4).reshape(-1, 3, side, side)
        thumbnail = self.use_thumbnail if use_thumbnail is None else use_thumbnail
        if thumbnail and len(tiles) > 1:
            tiles = torch.cat([tiles, resize(pixels, side, side)[None]])
        return tiles

    def tile_video(self, frames) -> torch.Tensor:
        """uint8 tiles [frames, 3, S, S]: one tile per frame, no thumbnail."""
        side = self.size["height"]
        return torch.stack([resize(to_pixels(frame), side, side) for frame in frames])

    def normalize(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, S, S] -> fp32, in [-1, 1] with the default mean and deviation."""
        mean = torch.tensor(self.image_mean).view(3, 1, 1)
        std = torch.tensor(self.image_std).view(3, 1, 1)
        scale = 1 / self.rescale_factor
        # Dividing by 255 and multiplying by 1/255 differ in the last bit; training divides.
        divisor = round(scale) if abs(scale - round(scale)) < 1e-6 else scale
        return (tiles.float() / divisor - mean) / std

    def preprocess(self, images=None, videos=None, return_tensors=None, **overrides) -> BatchFeature:
        """Tiles of pictures, then of videos (lists of frames).

        Returns:
            `pixel_values` fp32 [n, 3, S, S], `image_sizes` [pictures and frames, 2] (height, width), and
            `num_tiles`, one entry per picture or video.
        """
        images = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        groups, sizes = [], []
        for image in images:
            groups.append(self.tile_image(image, **overrides))
            sizes.append(_height_width(image))
        for frames in videos or []:
            groups.append(self.tile_video(frames))
            sizes += [_height_width(frame) for frame in frames]
        if not groups:
            raise ValueError("no images and no videos to process")
        data = {
            "pixel_values": self.normalize(torch.cat(groups)),
            "image_sizes": torch.tensor(sizes),
            "num_tiles": torch.tensor([len(group) for group in groups]),
        }
        if return_tensors is not None and TensorType(return_tensors) != TensorType.PYTORCH:
            data = {name: value.numpy() for name, value in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def __call__(self, images=None, videos=None, return_tensors=None, **overrides) -> BatchFeature:
        """Same as `preprocess`."""
        return self.preprocess(images, videos, return_tensors, **overrides)


def _height_width(image) -> tuple[int, int]:
    return (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape[:2])
