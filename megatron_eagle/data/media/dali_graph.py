"""DALI's graphs: videos and pictures in, squares of pixels out.

One graph serves every machine; only where the frames come from differs.  DALI 2.4's video decoder has two
traps that shape it: without `pad_mode="none"` a frame number past the end gives a black frame, and it knows
neither rotation nor colour tags (its RGB is always that of BT.601).

Shapes: F frames of h x w pixels, S tile size.
"""

from typing import Any, Literal

import numpy as np
from nvidia.dali import Pipeline, fn, types

FrameOrigin = Literal["nvdec", "dali_cpu", "frames"]

# Luma coefficients (red, blue), ITU-R BT.601 and BT.709.
_BT601, _BT709 = (0.299, 0.114), (0.2126, 0.0722)


def video_graph(
    tile_size: int, source: FrameOrigin, *, device_id: int | None, batch_size: int, threads: int
) -> Pipeline:
    """Frames of videos, resized (bicubic, antialiased): output uint8 [F, 3, S, S].

    Inputs of each sample: `colours` float32 [3, 3] turns the decoder's RGB into the right one; `video` is a
    file (uint8 [bytes]) and `frames` int32 [F] its wanted frames, for `nvdec` (GPU: H.264, HEVC, VP8, VP9)
    and `dali_cpu` (VP8, VP9, MJPEG); for `frames`, `video` holds decoded ones, uint8 [F, h, w, 3].
    """
    pipeline = Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1
    )
    with pipeline:
        colours = fn.external_source(name="colours", dtype=types.FLOAT, ndim=2)
        if source == "frames":
            video = fn.external_source(name="video", dtype=types.UINT8, ndim=4, layout="FHWC")
        else:
            video = fn.decoders.video(
                fn.external_source(name="video", dtype=types.UINT8, ndim=1),
                frames=fn.external_source(name="frames", dtype=types.INT32, ndim=1),
                device="mixed" if source == "nvdec" else "cpu",
                pad_mode="none",
                affine=False,  # the ranks of a machine would pin their threads to the same cores
            )
        video = _resize(video, [tile_size, tile_size], types.FLOAT)
        video = fn.cast(fn.coord_transform(video, M=colours), dtype=types.UINT8)
        pipeline.set_outputs(fn.transpose(video, perm=[0, 3, 1, 2]))
    return pipeline


def image_graph(tile_size: int, *, device_id: int | None, batch_size: int, threads: int) -> Pipeline:
    """Pictures at the size of their grid of tiles, and as a thumbnail: outputs uint8 [3, H, W], [3, S, S].

    Inputs of each sample: `picture` uint8 [bytes], `size` float32 [2] with H and W.  EXIF orientation is
    applied.
    """
    pipeline = Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1
    )
    with pipeline:
        picture = fn.decoders.image(
            fn.external_source(name="picture", dtype=types.UINT8, ndim=1),
            device="cpu" if device_id is None else "mixed",
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # as Pillow does
            affine=False,
        )
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        pictures = [_resize(picture, extent, types.UINT8) for extent in (size, [tile_size, tile_size])]
        pipeline.set_outputs(*(fn.transpose(picture, perm=[2, 0, 1]) for picture in pictures))
    return pipeline


def _resize(pixels: Any, size: Any, dtype: Any) -> Any:
    return fn.resize(pixels, size=size, dtype=dtype, interp_type=types.INTERP_CUBIC, antialias=True)


def colour_matrix(bt709: bool) -> np.ndarray:
    """float32 [3, 3] for `colours`: RGB decoded with BT.601 -> RGB of BT.709, or the identity.

    Both decode the same luma and chroma, so one matrix leads from one to the other.  It is exact where the
    decoder's RGB was not clipped, that is except for colours that a display could not show in BT.601.
    """
    if not bt709:
        return np.eye(3, dtype=np.float32)
    return (_from_ycc(_BT709) @ np.linalg.inv(_from_ycc(_BT601))).astype(np.float32)


def _from_ycc(luma: tuple[float, float]) -> np.ndarray:
    """Luma and colour differences (each within +-0.5) to RGB: ITU-R BT.601 section 2.5, BT.709 section 3."""
    red, blue = luma
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * (1 - blue) * blue / green, -2 * (1 - red) * red / green],
            [1, 2 * (1 - blue), 0],
        ]
    )
