"""Small pictures and a video made on the spot."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def write_picture(path: Path, width: int, height: int, mode: str = "RGB", orientation: int = 1) -> str:
    """A picture with structure at every scale; `orientation` is its EXIF value."""
    rng = np.random.default_rng(width * height)
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / (3 + c) + y / (9 - c)) + rng.normal(0, 20, x.shape) for c in range(4)]
    pixels = np.stack(waves, -1).clip(0, 255).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    elif mode == "P":
        image = Image.fromarray(pixels[..., :3]).quantize(32)
        image.info["transparency"] = 0
    else:
        image = Image.fromarray(pixels, "RGBA").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return str(path)


def write_video(path: Path, frames: int = 30, fps: int = 10, title: str | None = None) -> str:
    """Frame k is grey 8 k with a white bar at column k, so that every frame is recognised. MPEG-4."""
    with av.open(str(path), "w") as container:
        if title is not None:
            container.metadata["title"] = title
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.time_base = Fraction(1, fps)
        stream.gop_size = 8
        for k in range(frames):
            pixels = np.full((64, 96, 3), 8 * k % 256, np.uint8)
            pixels[:, 3 * k : 3 * k + 3] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)
