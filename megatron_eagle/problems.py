"""What preprocessing refuses, and why: one ledger line per dropped sample, nothing dropped silently."""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_eagle.files import write_lines


class Problem(Exception):
    """A sample cannot be used: `kind` is what the summary counts by, `detail` says what and where."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)  # both as args, so that it survives the trip from a worker process
        self.kind = kind
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


@dataclass(frozen=True)
class LedgerEntry:
    """One dropped sample: annotation file, 1-based line, the reason in words and its kind.

    `length` is the token limit for which it was dropped, None if it cannot be used at any length.
    """

    file: str
    line: int
    reason: str
    kind: str
    length: int | None = None


def write_ledger(path: Path, entries: list[LedgerEntry]) -> None:
    """Write the entries as JSON lines, in the order of the input.

    Raises:
        OSError: the file cannot be written.
    """
    write_lines(path, map(asdict, entries))


def count_kinds(entries: list[LedgerEntry], length: int) -> Counter[str]:
    """How many samples each kind of problem cost at this token limit."""
    return Counter(entry.kind for entry in entries if entry.length in (None, length))
