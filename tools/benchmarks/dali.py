"""DALI on a CPU beside the exact decoder: what a sparse remux costs and spares, and how far pixels differ.

Clips of 854 x 480 are made here (moving smooth noise, 25 frames per second).  DALI's own CPU decoder takes
only VP9 of these two codecs; on a GPU, `pytest -m gpu tests/gpu/test_dali.py` measures NVDEC.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from benchmarks.report import Report, interleaved, progress
from PIL import Image

from megatron_eagle.data.media.dali_graph import colour_matrix, video_graph
from megatron_eagle.data.media.decoder import MediaDecoder
from megatron_eagle.data.media.frame_index import read_frame_table
from megatron_eagle.data.media.frame_table import FrameIndex
from megatron_eagle.data.media.remux import sparse_remux

TILE = 448
SIZE = (854, 480)
SECONDS = 20
CODECS = {
    "h264": ("libx264", ".mp4", {"preset": "veryfast", "bf": "2"}),
    "vp9": ("libvpx-vp9", ".webm", {"deadline": "realtime", "cpu-used": "8", "b": "800k"}),
}
GOP = 125


def run() -> Report:
    """Measure 8 and 32 frames of a clip of each codec, one thread."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for codec in CODECS:
            progress(f"a clip in {codec}")
            path = _make_clip(Path(folder), codec)
            index = read_frame_table(path).index
            for count in (8, 32):
                progress(f"{codec}, {count} frames")
                numbers = np.linspace(0, index.n_frames - 1, count).round().astype(int)
                rows += _measure(path, codec, index.select(numbers))
    clip = f"{SECONDS} s of {SIZE[0]} x {SIZE[1]}, a key frame every {GOP}"
    title = f"DALI on a CPU: {clip}; one thread, median of 3"
    return Report(title, rows)


def _measure(path: str, codec: str, index: FrameIndex) -> list[dict[str, Any]]:
    exact, dali = (MediaDecoder(name, tile_size=TILE) for name in ("exact", "dali"))
    numbers = index.numbers.tolist()
    ways: dict[str, Callable[[], torch.Tensor | None]] = {
        "exact": lambda: exact.frames(path, index, numbers)[0],
        "DALI's graph on exact frames": lambda: dali.frames(path, index, numbers)[0],
        "sparse remux alone": partial(_remux_alone, path, index),
    }
    if codec == "vp9":
        pipeline = video_graph(TILE, "dali_cpu", device_id=None, batch_size=1, threads=1)
        ways["remux, DALI's own decoder"] = partial(_remuxed, pipeline, path, index)
        ways["whole file, DALI's own decoder"] = partial(
            _decode, pipeline, np.fromfile(path, np.uint8), index.numbers
        )
    seconds = interleaved(ways, repeats=3)
    expected = exact.frames(path, index, numbers)[0].int()
    rows = []
    for name, way in ways.items():
        tiles = way()
        apart = (tiles.int() - expected).abs() if tiles is not None else None
        rows.append(
            {
                "codec": codec,
                "frames": len(index.numbers),
                "way": name,
                "CPU seconds": seconds[name],
                "x exact": seconds[name] / seconds["exact"],
                "max difference of 255": int(apart.max()) if apart is not None else "",
                "mean difference": float(apart.float().mean()) if apart is not None else "",
            }
        )
    for decoder in (exact, dali):
        decoder.close()
    return rows


def _remux_alone(path: str, index: FrameIndex) -> None:
    sparse_remux(path, index)


def _remuxed(pipeline: Any, path: str, index: FrameIndex) -> torch.Tensor:
    remux = sparse_remux(path, index)
    return _decode(pipeline, np.frombuffer(remux.data, np.uint8), remux.frames)


def _decode(pipeline: Any, file: np.ndarray, frames: Sequence[int] | np.ndarray) -> torch.Tensor:
    pipeline.feed_input("video", [file])
    pipeline.feed_input("frames", [np.asarray(frames, np.int32)])
    pipeline.feed_input("colours", [colour_matrix(bt709=False)])
    return torch.from_numpy(np.array(pipeline.run()[0][0]))


def _make_clip(folder: Path, codec: str) -> str:
    encoder, suffix, options = CODECS[codec]
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    large = np.array(Image.fromarray(noise).resize((SIZE[0] + 250, SIZE[1] + 250), Image.Resampling.BICUBIC))
    path = folder / f"{codec}{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=25)
        assert isinstance(stream, av.VideoStream), "all codecs are of video"
        stream.width, stream.height = SIZE
        stream.pix_fmt, stream.gop_size, stream.options = "yuv420p", GOP, dict(options)
        for k in range(SECONDS * 25):
            down, right = (k * 3 % 500, k * 2 % 500)
            down, right = (min(x, 500 - x) for x in (down, right))  # there and back
            view = large[down : down + SIZE[1], right : right + SIZE[0]]
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(view), format="rgb24"))
            )
        container.mux(stream.encode())
    return str(path)
