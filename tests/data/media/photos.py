"""Coloured clips, and what a converter of BT.601 with smooth chroma makes of them."""

from pathlib import Path

import av
import numpy as np
from PIL import Image


def make_photos(
    path: Path,
    codec: str,
    *,
    bt709: bool = False,
    n_frames: int = 20,
    size: tuple[int, int] = (160, 120),
    gop: int = 6,
    options: dict[str, str] | None = None,
) -> str:
    """A clip of smooth coloured pictures, each unlike the others, tagged as BT.709 or BT.601."""
    full = codec == "mjpeg"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size = "yuvj420p" if full else "yuv420p", gop
        stream.options = options or {}
        context = stream.codec_context
        context.colorspace, context.color_range = 1 if bt709 else 6, 2 if full else 1
        for k in range(n_frames):
            noise = np.random.default_rng(k).integers(48, 208, (6, 8, 3), np.uint8)
            picture = np.array(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format=stream.pix_fmt,
                dst_colorspace="ITU709" if bt709 else "ITU601",
                dst_color_range="JPEG" if full else "MPEG",
            )
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def bt601_rgb(frame: av.VideoFrame) -> np.ndarray:
    """A 4:2:0 frame of even size as uint8 [h, w, 3]: ITU-R BT.601, chroma interpolated, any tag ignored."""
    luma, blue, red = (
        np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        for plane in frame.planes
    )
    full = frame.format.name == "yuvj420p" or frame.color_range == 2
    y = luma.astype(np.float64) if full else (luma - 16.0) * 255 / 219
    cb, cr = ((_doubled(chroma) - 128) * (1 if full else 255 / 224) for chroma in (blue, red))
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1)
    return np.clip(np.round(rgb), 0, 255).astype(np.uint8)


def _doubled(chroma: np.ndarray) -> np.ndarray:
    """Twice as high and wide: each new sample lies a quarter off an old one, towards its neighbour."""
    for axis in (0, 1):
        padded = np.pad(chroma.astype(np.float64), [(int(axis == a), int(axis == a)) for a in (0, 1)], "edge")
        before, here, after = (np.take(padded, range(i, i + chroma.shape[axis]), axis) for i in range(3))
        pairs = np.stack([0.75 * here + 0.25 * before, 0.75 * here + 0.25 * after], axis + 1)
        chroma = pairs.reshape(*(n * (2 if a == axis else 1) for a, n in enumerate(chroma.shape)))
    return chroma
