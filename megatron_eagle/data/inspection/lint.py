"""What is wrong with annotations and their media, by file and line, without making anything of them."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path

from megatron_eagle.data.annotations import unknown_keys
from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.annotations.keys import UNKNOWN_KEY
from megatron_eagle.data.annotations.mixture import Dataset
from megatron_eagle.data.annotations.parsing import read_record
from megatron_eagle.data.annotations.records import numbered, open_records
from megatron_eagle.data.annotations.roots import prepared_root
from megatron_eagle.data.media.remote.cache import CacheError
from megatron_eagle.data.media.remote.files import ONLY_LOCAL, MediaAccess
from megatron_eagle.data.sample import Sample
from megatron_eagle.data.sampling.probe import probe_document, probe_image, probe_video
from megatron_eagle.problems import LedgerEntry, Problem

_BLOCK = 256  # records that are read ahead of the slowest; of tables few, whose media lie beside them


@dataclass
class FileReport:
    """What the check of one file has found so far: how it was read, and what it counts."""

    dataset: Dataset
    form: str = ""
    n_records: int = 0
    dialects: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    unknown: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count(self, dialect: str | None, entry: LedgerEntry | None) -> None:
        """One more record: how it was read, and what is wrong with it."""
        self.n_records += 1
        self.dialects.update([dialect] if dialect else [])
        if entry is not None:
            self.kinds[entry.kind] += 1
            if entry.kind == UNKNOWN_KEY:
                self.unknown += unknown_keys.count([entry], {entry.file: self.dataset.name})

    def lines(self) -> list[str]:
        """How the file was read, and a line for each unknown key."""
        file, here = self.dataset.annotation, Path.cwd()
        name = file.relative_to(here) if file.is_relative_to(here) else file
        read = ", ".join(f"{name} ({n:,})" for name, n in self.dialects.most_common()) or "no dialect"
        return [
            f"{name}: {self.form}, {self.n_records:,} records, read as {read}",
            *unknown_keys.lines(self.unknown),
        ]


def problems(
    dataset: Dataset,
    *,
    media: bool,
    max_pixels: int,
    strict_jpeg: bool = False,
    files: MediaAccess = ONLY_LOCAL,
    report: FileReport | None = None,
    cache: Path | None = None,
    threads: int = 4,
) -> Iterator[LedgerEntry | None]:
    """For each record of a file in order: what is wrong with it, or None; unknown keys are in `report` alone.

    Args:
        media: read pictures to their end and the frame tables of videos too.
        cache: where packed archives are unpacked.
    """
    report = report or FileReport(dataset)
    check_media = _media_check(max_pixels, strict_jpeg, files)
    root = prepared_root(dataset.root, cache)

    def check(numbered: tuple[int, bytes | Problem]) -> tuple[str | None, LedgerEntry | None]:
        line, raw = numbered
        file, dialect = str(dataset.annotation), None
        try:
            if isinstance(raw, Problem):
                raise raw
            dialect = read_record(raw, dataset.conventions)[1].name
            sample = read_sample(
                raw,
                root=root,
                file=file,
                line=line,
                overrides=dataset.overrides,
                conventions=dataset.conventions,
            )
            if media:
                check_media(sample)
        except Problem as problem:
            return dialect, LedgerEntry(file, line, str(problem), problem.kind)
        except CacheError:
            raise
        except Exception as error:  # as in preprocessing, a strange file is a line of the report
            reason = f"unexpected error: {type(error).__name__}: {error}"
            return dialect, LedgerEntry(file, line, reason, "unexpected error")
        return dialect, None

    source = open_records(dataset.annotation, cache)
    report.form = source.form
    records = numbered(source)
    ahead = threads if source.in_workers else _BLOCK
    with ThreadPoolExecutor(threads) as pool:
        while block := list(islice(records, ahead)):
            for dialect, entry in pool.map(check, block):
                report.count(dialect, entry)
                yield entry if entry is None or entry.kind != UNKNOWN_KEY else None


def _media_check(max_pixels: int, strict_jpeg: bool, files: MediaAccess) -> Callable[[Sample], None]:
    """What reads a sample's media to their end; those that other samples had as well, once."""

    @lru_cache(maxsize=4096)
    def check_image(path: str) -> None:
        probe_image(path, max_pixels, strict_jpeg, files)

    check_document = lru_cache(maxsize=256)(
        lambda paper: probe_document(paper, max_pixels, strict_jpeg, files)
    )
    check_video = lru_cache(maxsize=256)(lambda source: probe_video(source, files))

    def check(sample: Sample) -> None:
        for path in sample.images:
            check_image(path)
        for document in sample.documents:
            check_document(document)
        for video in sample.videos:
            check_video(video)
            for path in video.frames.pictures if video.frames else ():
                check_image(path)

    return check
