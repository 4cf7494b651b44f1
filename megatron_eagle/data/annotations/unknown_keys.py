"""What a look at the first records says of a recipe: unknown keys, one line for each, and guesses."""

from collections import Counter
from collections.abc import Iterable, Mapping

from megatron_eagle.data.annotations.formats import read_sample
from megatron_eagle.data.annotations.keys import UNKNOWN_KEY
from megatron_eagle.data.annotations.mixture import Dataset
from megatron_eagle.data.annotations.parsing import check_keys, read_record
from megatron_eagle.data.annotations.records import RecordSource
from megatron_eagle.data.annotations.references import FRAMES_FPS
from megatron_eagle.errors import UserError
from megatron_eagle.problems import LedgerEntry, Problem

FIRST = 1000
"""Records of each file in which an unknown key stops preprocessing."""
_ADVICE = "list what changes nothing under ignore: of its entry in the recipe"


def check_first(datasets: Iterable[Dataset], sources: Iterable[RecordSource]) -> None:
    """Print the unknown keys of each file's first records; of an entry's files of one layout, of the first.

    Notes in which entries frames are given one by one at a rate that nobody named.

    Raises:
        UserError: there are unknown keys.
    """
    counts: Counter[tuple[str, str]] = Counter()
    guessed: dict[str, None] = {}
    seen: set[tuple[str, str]] = set()
    for dataset, source in zip(datasets, sources, strict=True):
        layout = dataset.name, source.layout
        if layout in seen:
            continue
        if source.layout and len(source):
            seen.add(layout)
        for number in range(min(FIRST, len(source))):
            try:
                raw = source.read(number)
                keys = check_keys(*read_record(raw, dataset.conventions), dataset.conventions)
                counts.update((dataset.name, key) for key in keys.unknown)
                shows = b"video" in raw and not keys.unknown and dataset.name not in guessed
                if shows and _guesses_a_rate(raw, dataset):
                    guessed[dataset.name] = None
            except Problem:  # the ledger will say so
                continue
        source.close()
    for name in guessed:
        print(
            f'note: entry "{name}" gives frames one by one and not their rate; they are taken for '
            f"{FRAMES_FPS} per second (frames_fps of the entry says otherwise)"
        )
    if counts:
        for line in lines(counts):
            print(line)
        raise UserError(
            f"{len(counts)} unknown keys in the first {FIRST:,} records; whether they change what is seen or "
            f"learned is not known: {_ADVICE}"
        )


def _guesses_a_rate(raw: bytes, dataset: Dataset) -> bool:
    sample = read_sample(raw, root=dataset.root, file="", line=0, conventions=dataset.conventions)
    return any(video.frames is not None and video.frames.assumed for video in sample.videos)


def count(ledger: Iterable[LedgerEntry], names: Mapping[str, str]) -> Counter[tuple[str, str]]:
    """How many samples each unknown key cost, by data set and key; `names` are those of the files."""
    counts: Counter[tuple[str, str]] = Counter()
    for entry in ledger:
        if entry.kind == UNKNOWN_KEY:
            keys = entry.reason.removeprefix(f"{UNKNOWN_KEY}: ").split(", ")
            counts.update((names.get(entry.file, entry.file), key) for key in keys)
    return counts


def lines(counts: Mapping[tuple[str, str], int]) -> list[str]:
    """A line for each key of a data set."""
    return [f'entry "{name}": unknown key {key}, {n:,} times' for (name, key), n in counts.items()]


def summary(ledger: Iterable[LedgerEntry], datasets: Iterable[Dataset]) -> list[str]:
    """The lines that end a run, of keys that came up later than in the first records."""
    found = lines(count(ledger, {str(dataset.annotation): dataset.name for dataset in datasets}))
    return [f"{line}; these samples are in the ledger: {_ADVICE}" for line in found]
