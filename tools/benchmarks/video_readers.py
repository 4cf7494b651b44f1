"""Video readers under one interface: a file's frames with the given numbers as tiles, one thread each."""

import importlib.util
import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import torch
from benchmarks.video_clips import read_number

from megatron_eagle.data.media.frame_index import read_frame_table
from megatron_eagle.data.media.video import decode_frames
from megatron_eagle.hf_model.tiles import resize

TILE = 448


def ours(path: str, numbers: Sequence[int]) -> torch.Tensor:
    """The frame table and the exact decoder of this project."""
    return decode_frames(path, read_frame_table(path).index, numbers, size=TILE, backend="exact")[0]


def sequential(path: str, numbers: Sequence[int]) -> torch.Tensor:
    """PyAV from the first frame to the last wanted one."""
    wanted: dict[int, torch.Tensor] = {}
    chosen = set(numbers)
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for number, frame in enumerate(container.decode(stream)):
            if number in chosen:
                wanted[number] = resize(frame.to_ndarray(format="rgb24"), TILE, TILE)
                if number == max(numbers):
                    break
    return torch.stack([wanted[number] for number in dict.fromkeys(numbers)])


def torchcodec(path: str, numbers: Sequence[int]) -> torch.Tensor:
    """torchcodec, which scans the file first (its exact mode)."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode="exact", dimension_order="NHWC")
    return _tiles(decoder.get_frames_at(list(numbers)).data.numpy())


def torchcodec_approximate(path: str, numbers: Sequence[int]) -> torch.Tensor:
    """torchcodec, which computes times from the header's frame rate."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, num_ffmpeg_threads=1, seek_mode="approximate", dimension_order="NHWC")
    return _tiles(decoder.get_frames_at(list(numbers)).data.numpy())


def decord(path: str, numbers: Sequence[int]) -> torch.Tensor:
    """decord's batch of frames."""
    from decord import VideoReader

    return _tiles(VideoReader(path, num_threads=1).get_batch(list(numbers)).asnumpy())


def opencv(path: str, numbers: Sequence[int]) -> torch.Tensor:
    """OpenCV, one seek by frame number for each frame."""
    import cv2

    cv2.setNumThreads(1)
    capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    tiles = []
    for number in numbers:
        capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        found, frame = capture.read()
        tiles.append(resize(np.ascontiguousarray(frame[..., ::-1]), TILE, TILE) if found else _black())
    return torch.stack(tiles)


READERS: dict[str, tuple[Callable[[str, Sequence[int]], torch.Tensor], str]] = {
    "ours": (ours, "av"),
    "PyAV, sequential": (sequential, "av"),
    "torchcodec": (torchcodec, "torchcodec"),
    "torchcodec, approximate": (torchcodec_approximate, "torchcodec"),
    "decord": (decord, "decord"),
    "OpenCV": (opencv, "cv2"),
}


def installed() -> list[str]:
    """Readers whose package is there."""
    return [name for name, (_, package) in READERS.items() if importlib.util.find_spec(package)]


def _tiles(frames: np.ndarray) -> torch.Tensor:
    return torch.stack([resize(frame, TILE, TILE) for frame in frames])


def _black() -> torch.Tensor:
    return torch.zeros(3, TILE, TILE, dtype=torch.uint8)


def _memory(field: str) -> int:
    """Bytes of this process: VmRSS is what it takes now, VmHWM the most that it took."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(reader: str, warm_up: str, path: str, numbers: Sequence[int]) -> dict[str, float | list[int]]:
    """CPU seconds, peak bytes beyond the returned tensor, and the numbers that the frames show.

    To be called in a process that does nothing else.
    """
    torch.set_num_threads(1)
    read, _ = READERS[reader]
    read(warm_up, [0, 1])  # imports and codecs are loaded
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    memory, before = _memory("VmRSS"), resource.getrusage(resource.RUSAGE_SELF)
    tiles = read(path, numbers)
    after, peak = resource.getrusage(resource.RUSAGE_SELF), _memory("VmHWM") - memory - tiles.numel()
    return {
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak": peak,
        "shown": [read_number(tile.permute(1, 2, 0).numpy()) for tile in tiles],
    }
