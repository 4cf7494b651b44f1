"""Features of 10-second clips in shards on disk, memory mapped when they are read.

A folder holds `shard-00000.npy` (float32 [clips, d], rows of length 1) and `shard-00000.json` (the clips and
what could not be read) for every `videos_per_shard` videos.  A shard is finished when its JSON file is there
with the right key: the videos with their sizes and times, the model, and the settings.
"""

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_eagle.data.media.source import file_metadata
from megatron_eagle.data.sample import VideoSource
from megatron_eagle.eagle_video.encoder import Encoder
from megatron_eagle.eagle_video.files import digest
from megatron_eagle.eagle_video.frames import frames_at, open_section, sample_times
from megatron_eagle.files import write_whole
from megatron_eagle.problems import Problem


@dataclass(frozen=True)
class FeatureSettings:
    """Length of a clip in seconds, frames taken a second, videos per shard."""

    clip_seconds: float = 10.0
    fps: float = 1.0
    videos_per_shard: int = 64


@dataclass(frozen=True)
class Clip:
    """A piece of a video file, start <= t < end in seconds of the file's own clock."""

    video: str
    start: float
    end: float


@dataclass(frozen=True)
class Shard:
    """Finished features of some videos; `problems` holds (video, reason) of what could not be read."""

    path: Path
    key: str
    clips: tuple[Clip, ...]
    problems: tuple[tuple[str, str], ...]

    @property
    def number(self) -> int:
        """Its place among the shards of its folder."""
        return int(self.path.stem.removeprefix("shard-"))

    @cached_property
    def features(self) -> np.ndarray:
        """float32 [clips, d], memory mapped."""
        found: np.ndarray = np.load(self.path, mmap_mode="r")
        return found


def split_clips(start: Fraction, end: Fraction, settings: FeatureSettings) -> list[tuple[Fraction, Fraction]]:
    """Cut a section into clips; a rest shorter than half a clip belongs to the clip before it."""
    length = Fraction(str(settings.clip_seconds))
    n = max(1, int((end - start) / length + Fraction(1, 2)))
    return [(start + i * length, end if i == n - 1 else start + (i + 1) * length) for i in range(n)]


@dataclass(frozen=True)
class WorkShare:
    """One of `of` machines that share the work: shards `number`, `number + of`, ...; from 0."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ValueError(f"a part is K/N with K from 0 to N - 1, not {self.number}/{self.of}")

    def has(self, shard: int) -> bool:
        """Whether this shard is this machine's."""
        return shard % self.of == self.number


def build_features(
    videos: list[VideoSource],
    folder: Path,
    encoder: Encoder,
    settings: FeatureSettings = FeatureSettings(),
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
    part: WorkShare = WorkShare(),
) -> list[Shard]:
    """Compute the shards of `part` that `folder` does not have yet; returns all that are there then, in the
    order of `videos`.

    A video that cannot be read costs its own clips and is listed in its shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = encoder.fingerprint()
    n = settings.videos_per_shard
    groups = [videos[i : i + n] for i in range(0, len(videos), n)]
    shards = []
    for number, group in enumerate(progress(groups)):
        path = folder / f"shard-{number:05d}.npy"
        key = digest([model, asdict(settings), [_identity(video) for video in group]])
        shard = _read_shard(path, key)
        if shard is None and part.has(number):
            shard = _make_shard(path, key, group, encoder, settings)
        shards.append(shard)
    return [shard for shard in shards if shard is not None]


def n_shards(videos: list[VideoSource], settings: FeatureSettings) -> int:
    """How many shards the features of `videos` take."""
    return -(-len(videos) // settings.videos_per_shard)


def _identity(video: VideoSource) -> list[Any]:
    try:
        file = file_metadata(video.path)
        state = [file.size, file.mtime_ns]
    except Problem:
        state = None
    return [video.path, str(video.start), str(video.end), state]


def _read_shard(path: Path, key: str) -> Shard | None:
    try:
        table = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if table["key"] != key or not path.is_file():
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    clips = tuple(Clip(*row) for row in table["clips"])
    return Shard(path, key, clips, tuple(map(tuple, table["problems"])))


def _make_shard(
    path: Path, key: str, videos: list[VideoSource], encoder: Encoder, settings: FeatureSettings
) -> Shard:
    clips: list[Clip] = []
    problems: list[tuple[str, str]] = []
    rows: list[torch.Tensor] = []
    for video in videos:
        try:
            found, features = _video_features(video, encoder, settings)
        except Problem as problem:
            problems.append((video.path, str(problem)))
            continue
        clips += found
        rows.append(features)
    features = torch.cat(rows) if rows else torch.empty(0, encoder.dim)
    buffer = io.BytesIO()
    np.save(buffer, features.numpy())
    path.with_suffix(".json").unlink(missing_ok=True)  # of other videos or settings
    write_whole(path, buffer.getvalue())
    table = {"key": key, "clips": [[c.video, c.start, c.end] for c in clips], "problems": problems}
    write_whole(path.with_suffix(".json"), json.dumps(table, ensure_ascii=False))
    return Shard(path, key, tuple(clips), tuple(problems))


def _video_features(
    video: VideoSource, encoder: Encoder, settings: FeatureSettings
) -> tuple[list[Clip], torch.Tensor]:
    """The clips of one video and their features, float32 [clips, d]: means over frames, of length 1."""
    metadata, start = open_section(video)
    sections = split_clips(start, start + metadata.duration, settings)
    times = [sample_times(*section, settings.fps) for section in sections]
    frames = frames_at(metadata, [t for of_clip in times for t in of_clip])
    clips, rows = [], []
    for section, of_clip in zip(sections, times, strict=True):
        # One clip's frames are held at a time, already as small as the model takes them.
        pictures = torch.stack([encoder.prepare(next(frames)) for _ in of_clip])
        mean = encoder.encode(pictures).mean(dim=0)
        rows.append(torch.nn.functional.normalize(mean, dim=0))
        clips.append(Clip(video.path, float(section[0]), float(section[1])))
    return clips, torch.stack(rows)
