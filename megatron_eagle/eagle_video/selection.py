"""Diversity selection: of new videos, the clips that are unlike anything the training set has.

The paper's rule: a candidate is kept if its highest cosine to any clip of the existing set is below
tau = 0.5.  Everything is written below one folder and reused by the next run.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_eagle.data.sample import VideoSource
from megatron_eagle.eagle_video.encoder import Encoder
from megatron_eagle.eagle_video.features import (
    Clip,
    FeatureSettings,
    Shard,
    WorkShare,
    build_features,
    n_shards,
)
from megatron_eagle.eagle_video.files import digest
from megatron_eagle.eagle_video.search import Blocks, greedy_distinct, highest_cosine
from megatron_eagle.errors import UserError
from megatron_eagle.files import split_lines, write_lines, write_whole


@dataclass(frozen=True)
class SelectionSettings:
    """A clip is kept below the cosine `tau`, and below `distinct` to all kept before it (None: no rule)."""

    tau: float = 0.5
    distinct: float | None = None
    clips: FeatureSettings = field(default_factory=FeatureSettings)
    blocks: Blocks = field(default_factory=Blocks)

    def __post_init__(self) -> None:
        for name in ("tau", "distinct"):
            value = getattr(self, name)
            if value is not None and not -1 < value <= 1:
                raise ValueError(f"{name} must be a cosine above -1 and at most 1, not {value}")


@dataclass(frozen=True)
class Decision:
    """What became of a candidate: its highest cosine, the clip it is most like, and why it was refused."""

    clip: Clip
    cosine: float
    nearest: Clip | None
    refused: str | None

    def record(self) -> dict[str, Any]:
        """As a JSON line."""
        nearest = asdict(self.nearest) if self.nearest else None
        base = {**asdict(self.clip), "cosine": round(self.cosine, 6), "nearest": nearest}
        return base if self.refused is None else {**base, "refused": self.refused}


@dataclass(frozen=True)
class Selection:
    """All decisions in the order of the candidates, and (video, reason) of what could not be read."""

    decisions: list[Decision]
    problems: list[tuple[str, str]]
    n_existing: int

    @property
    def kept(self) -> list[Decision]:
        """The candidates that training has nothing like."""
        return [d for d in self.decisions if d.refused is None]


def select(
    candidates: list[VideoSource],
    existing: list[VideoSource],
    folder: Path,
    encoder: Encoder,
    settings: SelectionSettings = SelectionSettings(),
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> Selection:
    """Select among the clips of `candidates`; writes `kept.jsonl`, `refused.jsonl` and `unreadable.jsonl`.

    Finished features and searches in `folder` are used again; the result does not depend on what was.
    """
    new = build_features(candidates, folder / "candidates", encoder, settings.clips, progress)
    old = build_features(existing, folder / "existing", encoder, settings.clips, progress)
    found = [_search(shard, old, folder / "search", settings.blocks, encoder) for shard in progress(new)]
    below = [cosine < settings.tau for cosine, _ in found]
    kept = below
    if settings.distinct is not None:
        features = [shard.features for shard in new]
        kept = greedy_distinct(features, below, settings.distinct, settings.blocks, encoder.device)
    result = Selection(
        list(_decisions(new, old, found, below, kept)),
        [problem for shard in [*new, *old] for problem in shard.problems],
        sum(len(shard.clips) for shard in old),
    )
    write_lines(folder / "kept.jsonl", (d.record() for d in result.kept))
    write_lines(folder / "refused.jsonl", (d.record() for d in result.decisions if d.refused))
    write_lines(folder / "unreadable.jsonl", ({"video": v, "reason": why} for v, why in result.problems))
    return result


def work_on_part(
    candidates: list[VideoSource],
    existing: list[VideoSource],
    folder: Path,
    encoder: Encoder,
    settings: SelectionSettings,
    part: WorkShare,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> bool:
    """One machine's share of `select`, in a folder that all of them see: features, and the search of its
    candidates if the features of the whole existing set are there; returns whether they were.

    `select` afterwards does what no part has done, and decides.
    """
    settings_of_clips = settings.clips, progress, part
    old = build_features(existing, folder / "existing", encoder, *settings_of_clips)
    new = build_features(candidates, folder / "candidates", encoder, *settings_of_clips)
    if len(old) < n_shards(existing, settings.clips):
        return False
    for shard in progress([shard for shard in new if part.has(shard.number)]):
        _search(shard, old, folder / "search", settings.blocks, encoder)
    return True


def _search(
    shard: Shard, existing: Sequence[Shard], folder: Path, blocks: Blocks, encoder: Encoder
) -> tuple[np.ndarray, np.ndarray]:
    """Highest cosine float32 [n] and row int64 [n] for a shard's clips, from disk if it was done before."""
    folder.mkdir(exist_ok=True)
    # Blocks change the order of sums, in the last bit: they belong to what a result follows from.
    key = digest([shard.key, [other.key for other in existing], asdict(blocks)])
    path = folder / f"{key[:32]}.npz"
    if path.is_file():
        with np.load(path) as stored:
            return stored["cosine"], stored["nearest"]
    arrays = [other.features for other in existing]
    cosine, nearest = highest_cosine(shard.features, arrays, blocks, encoder.device)
    buffer = io.BytesIO()
    np.savez(buffer, cosine=cosine, nearest=nearest)
    write_whole(path, buffer.getvalue())
    return cosine, nearest


def _decisions(
    new: list[Shard],
    old: list[Shard],
    found: list[tuple[np.ndarray, np.ndarray]],
    below: list[np.ndarray],
    kept: list[np.ndarray],
) -> Iterator[Decision]:
    starts = np.cumsum([0] + [len(shard.clips) for shard in old])
    for shard, (cosine, nearest), low, keep in zip(new, found, below, kept, strict=True):
        for i, clip in enumerate(shard.clips):
            row = int(nearest[i])
            which = int(np.searchsorted(starts, row, side="right")) - 1
            like = old[which].clips[row - starts[which]] if row >= 0 else None
            why = None if keep[i] else "like another candidate" if low[i] else "like the training set"
            yield Decision(clip, float(cosine[i]), like, why)


def selection_summary(selection: Selection) -> str:
    """The counts, one line each."""
    reasons = [d.refused for d in selection.decisions]
    lines = [
        f"{len(selection.decisions):,} candidate clips against {selection.n_existing:,} of the training set",
        f"  kept                    {reasons.count(None):,}",
        f"  like the training set   {reasons.count('like the training set'):,}",
        f"  like another candidate  {reasons.count('like another candidate'):,}",
    ]
    if selection.problems:
        lines.append(f"  unreadable videos       {len(selection.problems):,} (unreadable.jsonl)")
    return "\n".join(lines)


def read_kept(path: Path) -> list[Clip]:
    """The clips of a `kept.jsonl`.

    Raises:
        UserError: the file is unreadable, or not of this kind.
    """
    try:
        records = map(json.loads, split_lines(path.read_text(encoding="utf-8")))
        return [Clip(str(r["video"]), float(r["start"]), float(r["end"])) for r in records]
    except OSError as error:
        raise UserError(f"{path}: cannot read this list of clips: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f'{path}: expected lines {{"video", "start", "end"}}, as `megatron-eagle select` writes'
        ) from None
