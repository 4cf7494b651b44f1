"""What each data set wanted and what it got: frames, picture tiles and pages, as a table and a plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from megatron_eagle.data.store.manifest import read_manifest
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.errors import UserError

KINDS = ("frames", "tiles", "pages")


@dataclass(frozen=True)
class DatasetKept:
    """One data set at one token limit: rows, and per kind of `KINDS` how much was wanted and kept."""

    name: str
    length: int
    rows: int
    wanted: tuple[int, int, int]
    kept: tuple[int, int, int]


def kept_of_datasets(folder: str | Path) -> list[DatasetKept]:
    """For every length and data set of a store.

    Raises:
        UserError: a folder that is none.
    """
    manifest = read_manifest(folder)
    found = []
    for length in manifest.lengths:
        store = SampleStore(folder, length)
        source = np.asarray(manifest.dataset_of_source)[np.asarray(store.column("source"))]
        sums = {
            name: _sums(store, source, name)
            for name in ("n_frames", "frames_wanted", "n_tiles", "tiles_wanted")
        }
        pages_kept, pages_wanted = _pages(store, source)
        for i, name in enumerate(manifest.datasets):
            frames = int(sums["n_frames"][i])
            found.append(
                DatasetKept(
                    name,
                    length,
                    int((source == i).sum()),
                    (int(sums["frames_wanted"][i]), int(sums["tiles_wanted"][i]), int(pages_wanted[i])),
                    (frames, int(sums["n_tiles"][i]) - frames, int(pages_kept[i])),
                )
            )
    return found


def _sums(store: SampleStore, source: np.ndarray, name: str) -> np.ndarray:
    return np.bincount(source, np.asarray(store.column(name)), len(store.manifest.datasets))


def _pages(store: SampleStore, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pages kept and wanted of each data set."""
    documents = store.column("documents").combine_chunks()
    owner = np.repeat(source, np.asarray(pc.list_value_length(documents)))
    plans = documents.flatten()
    shown = np.asarray(pc.list_value_length(pc.struct_field(plans, "pages")))
    total = np.asarray(pc.struct_field(plans, "n_pages"))
    n = len(store.manifest.datasets)
    return np.bincount(owner, shown, n), np.bincount(owner, total, n)


def format_kept(found: Sequence[DatasetKept]) -> str:
    """The table; a dash where nothing was wanted."""
    width = max(8, *(len(dataset.name) for dataset in found)) + 2
    groups = "".join(f"{kind:^28}" for kind in ("frames", "picture tiles", "pages"))
    head = f"{'data set':<{width}}{'limit':>9}{'rows':>12}" + f"{'wanted':>11}{'kept':>11}{'%':>6}" * len(
        KINDS
    )
    lines = [" " * (width + 21) + groups, head, "-" * len(head)]
    for dataset in found:
        cells = "".join(
            f"{wanted:>11,}{kept:>11,}{f'{100 * kept / wanted:.1f}' if wanted else '-':>6}"
            for wanted, kept in zip(dataset.wanted, dataset.kept, strict=True)
        )
        lines.append(f"{dataset.name:<{width}}{dataset.length:>9}{dataset.rows:>12,}{cells}")
    return "\n".join(lines)


def plot_kept(found: Sequence[DatasetKept], path: str | Path) -> None:
    """Draw what is kept in % of what was wanted, a bar for each data set and length.

    The suffix of `path` names the format.

    Raises:
        UserError: there is no matplotlib, or it does not know the format.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a plot needs matplotlib: pip install matplotlib") from None
    names = list(dict.fromkeys(dataset.name for dataset in found))
    lengths = sorted({dataset.length for dataset in found})
    figure = Figure(figsize=(4 * len(KINDS), 1.5 + 0.28 * len(names) * len(lengths)), layout="constrained")
    FigureCanvasAgg(figure)
    for k, (axes, kind) in enumerate(zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True)):
        for j, length in enumerate(lengths):
            chosen = {dataset.name: dataset for dataset in found if dataset.length == length}
            share = [
                100 * chosen[n].kept[k] / chosen[n].wanted[k] if chosen[n].wanted[k] else 0 for n in names
            ]
            places = np.arange(len(names)) + (j - (len(lengths) - 1) / 2) * 0.8 / len(lengths)
            axes.barh(places, share, 0.75 / len(lengths), label=f"{length:,} tokens")
        axes.set(title=f"{'picture ' * (kind == 'tiles')}{kind} kept, %", xlim=(0, 100))
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
    axes.legend(loc="lower right", fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the plot {path}: {error}") from None
