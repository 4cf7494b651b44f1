"""What a recipe or a store mixes: each data set's share of samples and tokens, and how long samples are."""

from pathlib import Path

import numpy as np

from megatron_eagle.data.annotations.mixture import read_recipe
from megatron_eagle.data.annotations.records import open_records
from megatron_eagle.data.store.reader import Rows
from megatron_eagle.errors import UserError

_BAR = 40  # characters of the longest bar


def recipe_mix(path: str | Path) -> str:
    """The table of a recipe: lines, how often they are taken, and the samples that makes."""
    found: dict[str, tuple[str, int, float, int]] = {}
    for dataset in read_recipe(path):
        n_lines = len(open_records(dataset.annotation))
        _, lines, _, samples = found.get(dataset.name, ("", 0, 0.0, 0))
        samples += int(dataset.copies(n_lines).sum())
        found[dataset.name] = (dataset.name, lines + n_lines, dataset.repeat_time, samples)
    rows = list(found.values())
    total = sum(row[3] for row in rows) or 1
    head = ["data set", "lines", "repeat_time", "samples", "% of samples"]
    body = [[name, f"{n:,}", f"{r:g}", f"{s:,}", f"{100 * s / total:.2f}"] for name, n, r, s in rows]
    return _table(head, body)


def store_mix(store: Rows) -> str:
    """The table of one length of a store, and the histogram of its samples' lengths by samples and tokens."""
    if not len(store):
        raise UserError(f"{store.path} holds no sample at length {store.length}")
    manifest = store.manifest
    dataset = np.asarray(manifest.dataset_of_source)[np.asarray(store.column("source"))]
    columns = {name: np.asarray(store.column(name)).astype(np.int64) for name in _COLUMNS}
    body = []
    for i, name in enumerate(manifest.datasets):
        own = dataset == i
        sums = {key: int(values[own].sum()) for key, values in columns.items()}
        shares = [100 * own.mean(), *(100 * sums[key] / max(1, columns[key].sum()) for key in _COLUMNS)]
        mean = sums["n_tokens"] / max(1, own.sum())
        body.append([name, f"{own.sum():,}", f"{mean:,.0f}", *(f"{share:.2f}" for share in shares)])
    head = ["data set", "samples", "mean tokens", "% samples", "% tokens", "% visual", "% supervised"]
    return f"{_table(head, body)}\n\n{_histogram(columns['n_tokens'], store.length)}"


_COLUMNS = ("n_tokens", "n_visual", "n_supervised")


def _histogram(lengths: np.ndarray, limit: int) -> str:
    edges = [0, *(limit // 2**k for k in range(7, -1, -1))]
    edges = sorted(set(edges))
    lines = [f"{'tokens':>17}{'samples':>12}{'% samples':>11}{'% tokens':>10}"]
    for low, high in zip(edges, edges[1:], strict=False):
        own = (lengths > low) & (lengths <= high)
        share, tokens = own.mean(), lengths[own].sum() / lengths.sum()
        bar = "#" * round(_BAR * tokens)
        lines.append(
            f"{low + 1:>7,} - {high:>7,}{own.sum():>12,}{100 * share:>11.2f}{100 * tokens:>10.2f}  {bar}"
        )
    return "\n".join(lines)


def _table(head: list[str], body: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0])] + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])
        for row in (head, *body)
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)
