"""Clips whose every frame shows its own number, for the benchmark of video readers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 16  # of the number in a frame: two rows of eight blocks in its upper quarter
_WIDTH, _HEIGHT = 480, 272
_FPS = 25
_ENCODERS = {
    "libx264": {"preset": "ultrafast", "threads": "1"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "threads": "1"},
}


@dataclass(frozen=True)
class Clip:
    """How a clip is coded; `variable` makes its frame rate so; `repeats` plays it again, numbers included."""

    name: str
    minutes: float
    gop: int
    repeats: int = 1
    b_frames: int = 2
    codec: str = "libx264"
    variable: bool = False
    suffix: str = ".mp4"

    @property
    def n_numbers(self) -> int:
        """Frames after which the numbers begin again."""
        return int(self.minutes * 60 * _FPS)

    @property
    def n_frames(self) -> int:
        return self.repeats * self.n_numbers


SHORT = (
    Clip("30 s, GOP 30", 0.5, 30),
    Clip("30 s, GOP 250", 0.5, 250),
    Clip("30 s, GOP 250, no B-frames", 0.5, 250, b_frames=0),
    Clip("30 s, variable rate", 0.5, 250, variable=True),
    Clip("30 s, VP9", 0.5, 250, codec="libvpx-vp9", suffix=".webm"),
    Clip("30 s, HEVC", 0.5, 250, codec="libx265"),
)
LONG = (
    Clip("10 min, GOP 30", 10, 30),
    Clip("10 min, GOP 250", 10, 250),
    Clip("60 min, GOP 30", 10, 30, 6),
    Clip("60 min, GOP 250", 10, 250, 6),
)


def make_clip(folder: Path, clip: Clip) -> Path:
    """Encode a clip into `folder`, if it is not there."""
    kind = "_variable" if clip.variable else ""
    once = f"{clip.codec}_{clip.minutes:g}min_gop{clip.gop}_b{clip.b_frames}{kind}"
    path = folder / f"{once}_x{clip.repeats}{clip.suffix}"
    if path.exists():
        return path
    part = path.with_name(f"part{clip.suffix}")
    if clip.repeats > 1:
        _repeat(make_clip(folder, replace(clip, repeats=1)), part, clip)
    else:
        _encode(part, clip)
    return part.rename(path)


def read_number(tile: np.ndarray) -> int:
    """The number in a frame [h, w, 3], whatever its size."""
    height, width = tile.shape[0] // 8, tile.shape[1] // 8
    blocks = tile[: 2 * height, : 8 * width].reshape(2, height, 8, width, 3)
    inner = blocks[:, height // 4 : -height // 4, :, width // 4 : -width // 4].mean((1, 3, 4))
    return int(sum(int(value > 128) << i for i, value in enumerate(inner.flat)))


def _pictures(n: int) -> Iterator[np.ndarray]:
    """A texture that moves, under the frame's number."""
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (_HEIGHT // 8, _WIDTH // 8, 3), np.uint8)
    texture = np.repeat(np.repeat(small, 8, 0), 8, 1)
    for k in range(n):
        picture = np.roll(texture, (k // 3, 2 * k), (0, 1))
        bits = np.array([255 * (k >> i & 1) for i in range(BITS)], np.uint8).reshape(2, 8)
        picture[: _HEIGHT // 4] = np.repeat(np.repeat(bits, _HEIGHT // 8, 0), _WIDTH // 8, 1)[..., None]
        yield picture


def _encode(path: Path, clip: Clip) -> None:
    gaps = np.random.default_rng(0).integers(5, 120, clip.n_numbers)  # milliseconds
    times = np.cumsum(gaps) if clip.variable else np.arange(clip.n_numbers)
    unit = Fraction(1, 1000 if clip.variable else _FPS)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(clip.codec, rate=_FPS)
        assert isinstance(stream, av.VideoStream), "all codecs are of video"
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = _WIDTH, _HEIGHT, "yuv420p", clip.gop
        stream.codec_context.time_base = unit
        b_frames = {} if clip.codec == "libvpx-vp9" else {"bf": str(clip.b_frames)}
        stream.options = {**_ENCODERS[clip.codec], **b_frames}
        for picture, time in zip(_pictures(clip.n_numbers), times.tolist(), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _repeat(source: Path, target: Path, clip: Clip) -> None:
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        assert stream.time_base is not None, "a file that was just written says it"
        ticks = int(clip.minutes * 60 / stream.time_base)
        for k in range(clip.repeats):
            old.seek(0)
            for packet in old.demux(stream):
                if packet.pts is not None and packet.dts is not None:
                    packet.stream = copy
                    packet.pts += k * ticks
                    packet.dts += k * ticks
                    new.mux(packet)
