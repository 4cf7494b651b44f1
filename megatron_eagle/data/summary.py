"""The counts of a preprocessing run, and the table that its last screen shows."""

from collections import Counter
from dataclasses import asdict, dataclass, field

from megatron_eagle.data.ledger import LedgerEntry, count_kinds
from megatron_eagle.data.store import SampleColumns


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
    text_tokens: int = 0
    visual_tokens: int = 0
    supervised_tokens: int = 0

    def add(self, columns: SampleColumns) -> None:
        """Count one kept sample."""
        image_tiles = columns.n_tiles - columns.n_frames
        self.kept += 1
        self.lost_frames += columns.n_frames < columns.frames_wanted
        self.lost_tiles += image_tiles < columns.tiles_wanted
        self.frames_wanted += columns.frames_wanted
        self.frames_kept += columns.n_frames
        self.tiles_wanted += columns.tiles_wanted
        self.tiles_kept += image_tiles
        self.text_tokens += columns.n_text
        self.visual_tokens += columns.n_visual
        self.supervised_tokens += columns.n_supervised

    def finish(self, n_lines: int, not_taken: int, rows: int, ledger: list[LedgerEntry], length: int) -> dict:
        """Fill in what is known at the end; returns the counts as a dict for the manifest."""
        self.input, self.not_taken, self.rows = n_lines, not_taken, rows
        self.dropped = dict(sorted(count_kinds(ledger, length).items()))
        return asdict(self)


def format_summary(counts: dict[str, dict]) -> str:
    """The table of all lengths; `counts` as in the manifest."""
    columns = list(counts.values())
    kinds = sorted(Counter(kind for c in columns for kind in c["dropped"]))

    def row(label: str, values: list) -> str:
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
    for name in ("text", "visual", "supervised"):
        lines += [row(f"{name} tokens", [c[f"{name}_tokens"] for c in columns])]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
