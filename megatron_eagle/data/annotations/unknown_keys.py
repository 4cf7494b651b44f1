"""Unknown keys: one line for each key of a recipe's entry, before anything is made of its records."""

from collections import Counter
from collections.abc import Iterable, Mapping

from megatron_eagle.data.annotations.keys import UNKNOWN_KEY
from megatron_eagle.data.annotations.mixture import Dataset
from megatron_eagle.data.annotations.parsing import check_keys, read_record
from megatron_eagle.data.annotations.records import RecordSource
from megatron_eagle.errors import UserError
from megatron_eagle.problems import LedgerEntry, Problem

FIRST = 1000
"""Records of each file in which an unknown key stops preprocessing."""
_ADVICE = "list what changes nothing under ignore: of its entry in the recipe"


def check_first(datasets: Iterable[Dataset], sources: Iterable[RecordSource]) -> None:
    """Print the unknown keys of each file's first records.  Raises `UserError` if there are any."""
    counts: Counter[tuple[str, str]] = Counter()
    for dataset, source in zip(datasets, sources, strict=True):
        for number in range(min(FIRST, len(source))):
            try:
                keys = check_keys(*read_record(source.read(number), dataset.conventions), dataset.conventions)
            except Problem:  # the ledger will say so
                continue
            counts.update((dataset.name, key) for key in keys.unknown)
        source.close()
    if counts:
        for line in lines(counts):
            print(line)
        raise UserError(
            f"{len(counts)} unknown keys in the first {FIRST:,} records; whether they change what is seen or "
            f"learned is not known: {_ADVICE}"
        )


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
