"""What is wrong with annotations and their media, by file and line, without making anything of them."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice

from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.annotations.mixture import Dataset
from megatron_eagle.data.sampling.probe import probe_document, probe_image, probe_video
from megatron_eagle.problems import LedgerEntry, Problem

_BLOCK = 256  # lines that are read ahead of the slowest


def problems(
    dataset: Dataset, *, media: bool, max_pixels: int, threads: int = 4
) -> Iterator[LedgerEntry | None]:
    """For each line of a data set in order: what is wrong with it, or None.

    Reads pictures to their end and the frame tables of videos, unless `media` is false.
    """

    @lru_cache(maxsize=4096)
    def check_image(path: str) -> None:
        probe_image(path, max_pixels)

    check_document = lru_cache(maxsize=256)(lambda document: probe_document(document, max_pixels))
    check_video = lru_cache(maxsize=256)(probe_video)

    def check(numbered: tuple[int, bytes]) -> LedgerEntry | None:
        line, raw = numbered
        file = str(dataset.annotation)
        try:
            sample = read_sample(raw, root=dataset.root, file=file, line=line, overrides=dataset.overrides)
            if media:
                for path in sample.images:
                    check_image(path)
                for document in sample.documents:
                    check_document(document)
                for video in sample.videos:
                    check_video(video)
        except Problem as problem:
            return LedgerEntry(file, line, str(problem), problem.kind)
        except Exception as error:  # as in preprocessing, a strange file is a line of the report
            return LedgerEntry(
                file, line, f"unexpected error: {type(error).__name__}: {error}", "unexpected error"
            )
        return None

    with dataset.annotation.open("rb") as lines, ThreadPoolExecutor(threads) as pool:
        numbered = enumerate(lines, 1)
        while block := list(islice(numbered, _BLOCK)):
            yield from pool.map(check, block)
