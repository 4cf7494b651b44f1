"""Chapters of videos that have none: parts between changes of what is seen.

One frame a second is described by a feature of length 1: an encoder's, or without one the colours of an 8 x 8
grid and a histogram of 64 colours. A boundary is where the means of the features before and after it differ
most, by 1 - cosine; boundaries are taken from the strongest on, none closer to another than the shortest
part. A part that is still too long is cut again at its strongest change.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_eagle.data.sample import VideoSource
from megatron_eagle.eagle_video.chapters import VIDEO_SUFFIXES, Chapter, ChapteredVideo
from megatron_eagle.eagle_video.encoder import Encoder
from megatron_eagle.eagle_video.frames import frames_at, open_section, sample_times
from megatron_eagle.eagle_video.records import Notes
from megatron_eagle.problems import Problem

_GRID, _LEVELS = 8, 4


@dataclass(frozen=True)
class SegmentSettings:
    """Seconds a part lasts at least and at most, frames a second that are looked at, seconds on either side
    of a boundary that are compared, and the change (1 - cosine) that a boundary needs."""

    shortest: float = 10.0
    longest: float = 300.0
    fps: float = 1.0
    window: float = 5.0
    change: float = 0.1

    def __post_init__(self) -> None:
        for name in ("shortest", "longest", "fps", "window"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.longest < 2 * self.shortest:
            raise ValueError(f"longest must be at least twice shortest, {2 * self.shortest:g}")
        if not 0 < self.change <= 2:
            raise ValueError(f"change must lie above 0 and be at most 2, not {self.change}")


def detect_all(
    videos: Path, notes: Notes, settings: SegmentSettings, encoder: Encoder | None = None
) -> list[ChapteredVideo]:
    """Every video file directly in `videos`, with detected chapters; what cannot be read goes to `notes`."""
    found = []
    for path in sorted(file for file in videos.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES):
        try:
            chapters = tuple(detect_chapters(str(path), settings, encoder))
        except Problem as problem:
            notes.add(problem.kind, f"{path.stem}: {problem.detail}")
            continue
        found.append(ChapteredVideo(path.stem, str(path), chapters))
    return found


def detect_chapters(path: str, settings: SegmentSettings, encoder: Encoder | None = None) -> list[Chapter]:
    """The parts of one video, titled "Part 1 of n" and so on.

    Raises:
        Problem: the video cannot be read.
    """
    metadata, begin = open_section(VideoSource(path))
    times = sample_times(begin, begin + metadata.duration, settings.fps)
    features = np.stack([_describe(frame, encoder) for frame in frames_at(metadata, times)])
    duration = float(metadata.duration)
    step = duration / len(times)
    cuts = boundaries(features, step, settings)
    edges = [0.0, *(cut * step for cut in cuts), duration]
    parts = list(zip(edges, edges[1:], strict=False))
    return [Chapter(f"Part {i} of {len(parts)}", *part) for i, part in enumerate(parts, start=1)]


def boundaries(features: np.ndarray, step: float, settings: SegmentSettings) -> list[int]:
    """Numbers of the samples with which a part begins, ascending, without 0; `step` is seconds a sample.

    `features` float32 [n, d] of length 1.
    """
    scores = change_scores(features, max(1, round(settings.window / step)))
    shortest = max(1, round(settings.shortest / step))
    strong = scores >= settings.change
    cuts: list[int] = []
    for cut in np.argsort(-scores, kind="stable"):
        if strong[cut] and all(abs(cut - edge) >= shortest for edge in (0, len(scores), *cuts)):
            cuts.append(int(cut))
    longest = settings.longest / step
    waiting = list(zip([0, *sorted(cuts)], [*sorted(cuts), len(scores)], strict=True))
    while waiting:
        first, end = waiting.pop()
        if end - first > longest:
            cut = first + shortest + int(np.argmax(scores[first + shortest : end - shortest + 1]))
            cuts.append(cut)
            waiting += [(first, cut), (cut, end)]
    return sorted(cuts)


def change_scores(features: np.ndarray, window: int) -> np.ndarray:
    """1 - cosine between the means of the `window` samples before each sample and of those from it on.

    float64 [n]; fewer samples at the ends; 0 for the first one.
    """
    sums = np.concatenate([np.zeros((1, features.shape[1])), np.cumsum(features, axis=0, dtype=np.float64)])
    here = np.arange(1, len(features))
    before = sums[here] - sums[np.maximum(here - window, 0)]
    after = sums[np.minimum(here + window, len(features))] - sums[here]
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosine = (before * after).sum(axis=1) / np.maximum(lengths, 1e-12)
    return np.concatenate([[0.0], 1 - cosine])


def _describe(frame: np.ndarray, encoder: Encoder | None) -> np.ndarray:
    """A frame uint8 [h, w, 3] -> float32 [d] of length 1."""
    if encoder is not None:
        feature = encoder.encode(encoder.prepare(frame)[None])[0]
        return torch.nn.functional.normalize(feature, dim=0).numpy()
    pixels = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None].float()
    grid = torch.nn.functional.adaptive_avg_pool2d(pixels, _GRID)[0].flatten() / 255 - 0.5
    levels = frame.reshape(-1, 3).astype(np.int64) * _LEVELS // 256
    histogram = np.bincount(levels @ [_LEVELS**2, _LEVELS, 1], minlength=_LEVELS**3) / len(levels)
    # Both halves weigh the same; roots of shares have length 1 together.
    colours = torch.nn.functional.normalize(grid, dim=0)
    return torch.cat([colours, torch.from_numpy(np.sqrt(histogram)).float()]).div(2**0.5).numpy()
