"""Small copies of all videos of an archive, and annotations that name them; restartable at any point.

OUT/videos/...           the copies, under the paths of their sources
OUT/<data set>.jsonl     the annotations, and OUT/recipe.json to preprocess them by
OUT/transcoded.jsonl     a line for each finished copy: what it was made of, and how
OUT/failed.jsonl         a line for each video that has none, with the reason; annotations keep its source
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.annotations.mixture import Dataset, datasets_of
from megatron_eagle.data.annotations.records import numbered, open_records
from megatron_eagle.data.annotations.rewrite import as_line, replace_videos
from megatron_eagle.data.annotations.roots import archives_of, prepared_root
from megatron_eagle.data.media.remote.addresses import is_remote
from megatron_eagle.data.media.remote.files import MediaAccess
from megatron_eagle.data.media.remote.settings import RemoteSettings
from megatron_eagle.data.media.source import file_metadata, member_ref, row_ref
from megatron_eagle.data.media.transcode import TranscodeSettings, transcode_video
from megatron_eagle.data.preparation.archives import remove_unpacked
from megatron_eagle.data.preparation.engines import in_processes
from megatron_eagle.data.preparation.journal import lock_file
from megatron_eagle.errors import UserError
from megatron_eagle.files import append_line, beside, from_record, read_records, write_lines, write_whole
from megatron_eagle.problems import Problem

SUFFIXES = frozenset(
    (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp")
)
"""What counts as a video where a folder is given."""


@dataclass(frozen=True)
class Copy:
    """A finished copy: its path, bytes and frames, and the source with the bytes and date that it had."""

    source: str
    source_bytes: int
    source_mtime_ns: int
    target: str
    bytes: int
    frames: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A video that has no copy, and why; `kind` as in `problems.Problem`."""

    source: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Transcoded:
    """What a run came to: all copies that there are, how many of them are new, and what failed."""

    copies: list[Copy]
    n_new: int
    failures: list[Failure]


def transcode(
    source: str | Path,
    output: str | Path,
    settings: TranscodeSettings,
    workers: int | None = None,
    remote: RemoteSettings | None = None,
) -> Transcoded:
    """Copy the videos of a recipe, an annotation file or a folder (see `media.transcode`) into `output`.

    The same command goes on where it was stopped: a copy is finished or not there, and is kept while its
    source and the settings are the same.  What failed is tried again.

    Raises:
        UserError: the input cannot be read or names no video, `workers` is below 1, the output cannot be
            written, or another process writes it.
    """
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    source, output = Path(source), Path(output).resolve()
    datasets = [] if source.is_dir() else datasets_of(source)
    archives = output / ".archives"
    paths = _videos_of(datasets, archives) if datasets else _videos_in(source.resolve(), output)
    if not paths:
        raise UserError(f"{source} names no video")
    targets = _targets(paths, Path("/") if datasets else source.resolve(), output / "videos")
    try:
        output.mkdir(parents=True, exist_ok=True)
        with lock_file(output / ".lock"):
            copies, failures, n_new = _copy_all(
                paths, targets, settings, workers, output, remote or RemoteSettings()
            )
            made = {path: copy.target for path, copy in copies.items()}
            _write_annotations(datasets, made, output, archives)
        remove_unpacked(archives)
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror or error}; when that is mended run the same command "
            "again, it continues where it stopped"
        ) from None
    return Transcoded(list(copies.values()), n_new, failures)


def _copy_all(
    paths: list[str],
    targets: dict[str, Path],
    settings: TranscodeSettings,
    workers: int | None,
    output: Path,
    remote: RemoteSettings,
) -> tuple[dict[str, Copy], list[Failure], int]:
    """The copies by their sources, what failed, and how many copies are new."""
    log = output / "transcoded.jsonl"
    # The log stays as other versions wrote it; of each source only the last copy counts.
    written = {record["source"]: record for record in read_records(log) if "source" in record}
    write_lines(log, written.values())
    done = _finished(written.values())
    files = MediaAccess(remote)
    copies = {
        path: done[path] for path in paths if _is_current(done.get(path), targets[path], settings, files)
    }
    failures: list[Failure] = []
    jobs = [(path, targets[path]) for path in paths if path not in copies]
    make = partial(_transcode, settings, log, remote)
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    results = in_processes(make, jobs, workers) if workers > 1 else (r for job in jobs for r in make(job))
    bar: dict[str, Any] = {
        "total": len(paths),
        "initial": len(copies),
        "desc": "transcode",
        "unit": " videos",
    }
    for result in tqdm(results, **bar, dynamic_ncols=True):
        if isinstance(result, Failure):
            failures.append(result)
        else:
            copies[result.source] = result
    write_lines(output / "failed.jsonl", map(asdict, failures))
    return copies, failures, len(jobs) - len(failures)


def _videos_of(datasets: list[Dataset], archives: Path) -> list[str]:
    """The videos of all lines that can be read, each once, in their order."""
    lines = (line for dataset in datasets for line in _lines(dataset, archives))
    return list(dict.fromkeys(video for _, videos in lines for video in videos))


def _lines(dataset: Dataset, archives: Path) -> Iterator[tuple[bytes, list[str]]]:
    """Each record as a line, and the video files that it names; none where it cannot be read."""
    source, root = open_records(dataset.annotation, archives), prepared_root(dataset.root, archives)
    for number, raw in numbered(source):
        if isinstance(raw, Problem):  # a line of the ledger is what is left of it
            yield b"\n", []
            continue
        line = raw if source.form.startswith("JSON lines") else as_line(raw)
        try:
            sample = read_sample(
                raw,
                root=root,
                file=str(dataset.annotation),
                line=number,
                conventions=dataset.conventions,
            )
            yield line, [video.path for video in sample.videos if video.frames is None]
        except Problem:  # preprocessing will say so
            yield line, []


def _videos_in(folder: Path, output: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(str(path) for path in found if not path.is_relative_to(output))


def _targets(paths: list[str], root: Path, folder: Path) -> dict[str, Path]:
    """Where each copy goes: the source's path below `root`, with a suffix that says MP4."""
    targets: dict[str, Path] = {}
    for path in paths:
        name = path.replace("://", "/") if is_remote(path) else os.path.relpath(_place(path), root)
        targets[path] = folder / (name if name.endswith(".mp4") else f"{name}.mp4")
    taken: dict[Path, str] = {}
    for path, target in targets.items():
        if taken.setdefault(target, path) != path:
            raise UserError(
                f"the copies of {taken[target]} and {path} would have one name; rename one of them"
            )
    return targets


def _place(path: str) -> str:
    """What a copy is named by: a path, also of what is inside of another file."""
    if member := member_ref(path):
        return f"{member.file}-{member.offset}"
    if value := row_ref(path):
        return "-".join(map(str, (value.file, value.row, *value.steps)))
    return path


def _finished(records: Iterable[dict[str, Any]]) -> dict[str, Copy]:
    """The copies that earlier runs wrote down, by their sources."""
    found = {}
    for record in records:
        with suppress(TypeError):
            found[record["source"]] = from_record(Copy, record)
    return found


def _is_current(copy: Copy | None, target: Path, settings: TranscodeSettings, media: MediaAccess) -> bool:
    if copy is None or copy.target != str(target) or copy.settings != asdict(settings):
        return False
    try:
        metadata = media.metadata(copy.source)
        size = file_metadata(copy.target).size
    except Problem:
        return False
    return (metadata.size, metadata.mtime_ns, size) == (copy.source_bytes, copy.source_mtime_ns, copy.bytes)


@lru_cache(maxsize=1)
def _media(remote: RemoteSettings) -> MediaAccess:
    return MediaAccess(remote)


def _transcode(
    settings: TranscodeSettings, log: Path, remote: RemoteSettings, job: tuple[str, Path]
) -> list[Copy | Failure]:
    """Make one copy and write it down at once, so that no kill can lose it."""
    source, target = job
    try:
        with _media(remote).local(source) as local:
            metadata = file_metadata(local)
            frames = transcode_video(local, target, settings)
    except Problem as problem:
        return [Failure(source, problem.kind, str(problem))]
    size = target.stat().st_size
    copy = Copy(source, metadata.size, metadata.mtime_ns, str(target), size, frames, asdict(settings))
    append_line(log, asdict(copy))
    return [copy]


def _write_annotations(
    datasets: list[Dataset], targets: dict[str, str], output: Path, archives: Path
) -> None:
    """Paths of videos become absolute; those of pictures stay relative to the root that they had."""
    recipe: dict[str, dict[str, Any]] = {}
    for dataset in datasets:
        names = recipe.get(dataset.name, {}).get("annotation", [])
        number = f"-{len(names) + 1}" if names else ""
        name = f"{quote(dataset.name, safe=' ').removesuffix('.jsonl')}{number}.jsonl"
        root = prepared_root(dataset.root, archives)
        with beside(output / name) as partial_file, partial_file.open("wb") as file:
            for raw, videos in _lines(dataset, archives):
                new = replace_videos(raw, root, targets, dataset.conventions) if videos else raw
                file.write(new)
        settings = {"repeat_time": dataset.repeat_time, **dataset.overrides, **_how(dataset)}
        recipe[dataset.name] = {
            "annotation": [*names, name],
            "root": archives_of(dataset.root) or dataset.root,
            **settings,
        }
    if recipe:
        write_whole(output / "recipe.json", json.dumps(recipe, indent=1) + "\n")


def _how(dataset: Dataset) -> dict[str, Any]:
    """What an entry says of how its records are read and chosen, where it says anything."""
    said = {**asdict(dataset.conventions), "sampling_strategy": dataset.strategy}
    return {key: value for key, value in said.items() if value and value != "all"}
