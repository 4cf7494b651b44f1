"""Pictures and video frames to tiles for Eagle 2.5: Image Area Preservation (paper, section 3.2).

Self-contained: shipped inside every exported checkpoint and loaded with `trust_remote_code`
(transformers 4.51 to 5.x). The same arithmetic, resize and normalisation as in training: equal pixels in,
equal tiles out. Shapes: n tiles, S tile side in pixels.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils.generic import TensorType

from .grids import has_thumbnail, select_grid
from .pictures import to_rgb
from .tiles import MEAN, RESCALE_FACTOR, STD, image_tiles, normalize, resize

try:  # transformers 4.51 does not offer it at the top level when torchvision is absent
    from transformers import ImageProcessingMixin
except ImportError:
    from transformers.image_processing_base import ImageProcessingMixin


def to_pixels(image: Any) -> np.ndarray:
    """PIL image, or uint8 array or tensor [H, W, 3], as a uint8 array [H, W, 3].

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
    return np.ascontiguousarray(array)


class ImageProcessorSettings(TypedDict, total=False):
    """What `from_pretrained` takes beside the folder; transformers 5 asks for it."""

    size: dict[str, int]
    rescale_factor: float
    image_mean: Sequence[float]
    image_std: Sequence[float]
    min_dynamic_tiles: int
    max_dynamic_tiles: int
    use_thumbnail: bool
    tiling: str


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
    valid_kwargs = ImageProcessorSettings

    def __init__(
        self,
        size: dict[str, int] | None = None,
        rescale_factor: float = RESCALE_FACTOR,
        image_mean: Sequence[float] = MEAN,
        image_std: Sequence[float] = STD,
        min_dynamic_tiles: int = 1,
        max_dynamic_tiles: int = 12,
        use_thumbnail: bool = True,
        tiling: str = "iap",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]  # transformers'
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

    def grid(
        self,
        width: int,
        height: int,
        min_dynamic_tiles: int | None = None,
        max_dynamic_tiles: int | None = None,
    ) -> tuple[int, int]:
        """Columns and rows in which a picture of so many pixels is cut."""
        return select_grid(
            width,
            height,
            tile_size=self.size["height"],
            max_tiles=self.max_dynamic_tiles if max_dynamic_tiles is None else max_dynamic_tiles,
            min_tiles=self.min_dynamic_tiles if min_dynamic_tiles is None else min_dynamic_tiles,
            tiling=self.tiling,
        )

    def count_tiles(
        self,
        width: int,
        height: int,
        min_dynamic_tiles: int | None = None,
        max_dynamic_tiles: int | None = None,
        use_thumbnail: bool | None = None,
    ) -> int:
        """Tiles of a picture of so many pixels, as `tile_image` cuts it."""
        grid = self.grid(width, height, min_dynamic_tiles, max_dynamic_tiles)
        whole = self.use_thumbnail if use_thumbnail is None else use_thumbnail
        return grid[0] * grid[1] + (whole and has_thumbnail(grid))

    def tile_image(
        self,
        image: Any,
        min_dynamic_tiles: int | None = None,
        max_dynamic_tiles: int | None = None,
        use_thumbnail: bool | None = None,
    ) -> torch.Tensor:
        """uint8 tiles [n, 3, S, S] of one picture, row-major, the thumbnail last."""
        pixels, side = to_pixels(image), self.size["height"]
        grid = self.grid(pixels.shape[1], pixels.shape[0], min_dynamic_tiles, max_dynamic_tiles)
        wanted = self.use_thumbnail if use_thumbnail is None else use_thumbnail
        return image_tiles(pixels, grid, side, use_thumbnail=wanted)

    def tile_video(self, frames: Iterable[Any]) -> torch.Tensor:
        """uint8 tiles [frames, 3, S, S]: one tile per frame, no thumbnail."""
        side = self.size["height"]
        return torch.stack([resize(to_pixels(frame), side, side) for frame in frames])

    def normalize(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 [n, 3, S, S] -> fp32, in [-1, 1] with the default mean and deviation."""
        return normalize(tiles, self.rescale_factor, self.image_mean, self.image_std)

    def preprocess(
        self,
        images: Any = None,
        videos: Any = None,
        return_tensors: str | TensorType | None = None,
        **overrides: Any,
    ) -> BatchFeature:
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
        data: dict[str, Any] = {
            "pixel_values": self.normalize(torch.cat(groups)),
            "image_sizes": torch.tensor(sizes),
            "num_tiles": torch.tensor([len(group) for group in groups]),
        }
        if return_tensors is not None and TensorType(return_tensors) != TensorType.PYTORCH:
            data = {name: value.numpy() for name, value in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def __call__(
        self,
        images: Any = None,
        videos: Any = None,
        return_tensors: str | TensorType | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Same as `preprocess`."""
        return self.preprocess(images, videos, return_tensors, **overrides)


def _height_width(image: Any) -> tuple[int, int]:
    if isinstance(image, Image.Image):
        return image.height, image.width
    height, width = image.shape[:2]
    return height, width
