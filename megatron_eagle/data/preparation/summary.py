"""The counts of a preprocessing run, and the table that its last screen shows."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_eagle.problems import LedgerEntry, count_kinds


@dataclass
class LengthCounts:
    """What happened to the input at one token limit; `input` = `not_taken` + `kept` + all of `dropped`.

    `not_taken` are lines left out by a repeat_time below 1, `rows` the store's rows (a repeated sample has
    several).
    """

    input: int = 0
    not_taken: int = 0
    kept: int = 0
    rows: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    lost_frames: int = 0
    lost_tiles: int = 0
    frames_wanted: int = 0
    frames_kept: int = 0
    tiles_wanted: int = 0
    tiles_kept: int = 0
    pages_wanted: int = 0
    pages_kept: int = 0
    text_tokens: int = 0
    visual_tokens: int = 0
    supervised_tokens: int = 0

    @classmethod
    def of(cls, tables: Iterable[pa.Table], ledger: list[LedgerEntry], length: int) -> "LengthCounts":
        """Count the kept samples (`store.reader.SampleColumns`) and what the ledger holds of this length."""
        counts = cls(dropped=dict(sorted(count_kinds(ledger, length).items())))
        for samples in tables:
            counts._add(samples)
        return counts

    def _add(self, samples: pa.Table) -> None:
        def column(name: str) -> np.ndarray:
            return np.asarray(samples[name]).astype(np.int64)

        documents = samples["documents"].combine_chunks().flatten()
        pages = pc.list_value_length(pc.struct_field(documents, "pages"))
        frames, frames_wanted = column("n_frames"), column("frames_wanted")
        tiles, tiles_wanted = column("n_tiles") - frames, column("tiles_wanted")
        self.kept += len(samples)
        self.lost_frames += int((frames < frames_wanted).sum())
        self.lost_tiles += int((tiles < tiles_wanted).sum())
        self.frames_wanted += int(frames_wanted.sum())
        self.frames_kept += int(frames.sum())
        self.tiles_wanted += int(tiles_wanted.sum())
        self.tiles_kept += int(tiles.sum())
        self.pages_wanted += pc.sum(pc.struct_field(documents, "n_pages")).as_py() or 0
        self.pages_kept += pc.sum(pages).as_py() or 0
        self.text_tokens += int(column("n_text").sum())
        self.visual_tokens += int(column("n_visual").sum())
        self.supervised_tokens += int(column("n_supervised").sum())


def format_summary(counts: dict[str, dict[str, Any]]) -> str:
    """The table of all lengths; `counts` as in the manifest."""
    columns = list(counts.values())
    kinds = sorted(Counter(kind for c in columns for kind in c["dropped"]))

    def row(label: str, values: list[Any]) -> str:
        cells = (f"{value:,}" if isinstance(value, int) else value for value in values)
        return f"{label:<38}" + "".join(f"{cell:>22}" for cell in cells)

    def of(kept: str, wanted: str) -> list[str]:
        return [f"{c[kept]:,} of {c[wanted]:,}" for c in columns]

    lines = [row("token limit", [int(length) for length in counts])]
    lines += [row("samples in the input", [c["input"] for c in columns])]
    if any(c["not_taken"] for c in columns):
        lines += [row("  left out (repeat_time < 1)", [c["not_taken"] for c in columns])]
    lines += [row("  kept", [c["kept"] for c in columns])]
    lines += [row("  dropped", [sum(c["dropped"].values()) for c in columns])]
    lines += [row(f"    {kind}", [c["dropped"].get(kind, 0) for c in columns]) for kind in kinds]
    if any(c["rows"] != c["kept"] for c in columns):
        lines += [row("rows, repetitions counted", [c["rows"] for c in columns])]
    lines += [row("samples that lost frames", [c["lost_frames"] for c in columns])]
    lines += [row("samples that lost tiles", [c["lost_tiles"] for c in columns])]
    lines += [row("frames kept", of("frames_kept", "frames_wanted"))]
    lines += [row("picture tiles kept", of("tiles_kept", "tiles_wanted"))]
    if any(c["pages_wanted"] for c in columns):
        lines += [row("pages kept", of("pages_kept", "pages_wanted"))]
    for name in ("text", "visual", "supervised"):
        lines += [row(f"{name} tokens", [c[f"{name}_tokens"] for c in columns])]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
