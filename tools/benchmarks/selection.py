"""Exact search for the most similar clip: ours, block by block from disk, beside faiss's flat index.

Random features of SigLIP's length in files on disk, as a selection leaves them. faiss holds the existing set
in memory; it is measured where that is possible. Peak memory is that of a process of its own, above what it
has before the search. The growth shows what 1 M candidates against 10 M clips would cost.
"""

import importlib.util
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.report import Report, progress
from numpy.lib.format import open_memmap

from megatron_eagle.eagle_video.search import Blocks, highest_cosine

DIM = 1152
SIZES = ((1_000, 10_000), (1_000, 100_000), (10_000, 100_000))
LARGE = ((10_000, 1_000_000), (100_000, 1_000_000))
TARGET = 1_000_000 * 10_000_000


def ours(candidates: Path, existing: Path) -> np.ndarray:
    """Blocks of at most 8,192 x 4,096 rows."""
    rows = np.load(candidates, mmap_mode="r")
    return highest_cosine(rows, [np.load(existing, mmap_mode="r")], Blocks(8192, 4096))[0]


def with_faiss(candidates: Path, existing: Path) -> np.ndarray:
    """faiss's exact index, all of the existing set in memory."""
    import faiss

    index = faiss.IndexFlatIP(DIM)
    index.add(np.load(existing))
    found: np.ndarray = index.search(np.load(candidates), 1)[0][:, 0]
    return found


def run(large: bool = False) -> Report:
    """Seconds and memory of each search at each size."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {n: _features(Path(folder), n) for n in sorted({n for size in SIZES for n in size})}
        for q, e in (*SIZES, *LARGE) if large else SIZES:
            for n in (q, e):
                if n not in files:
                    files[n] = _features(Path(folder), n)
            rows += _compare(files[q], files[e], q, e)
    return Report(
        f"Highest cosine of q candidates to e existing clips, features of length {DIM}",
        rows,
        "--large" if large else "",
    )


def _compare(candidates: Path, existing: Path, q: int, e: int) -> list[dict[str, Any]]:
    rows, cosines = [], {}
    contestants: dict[str, Callable[..., Any]] = {"ours": ours}
    if importlib.util.find_spec("faiss") and e <= 1_000_000:
        contestants["faiss flat"] = with_faiss
    for name, search in contestants.items():
        progress(f"{q:,} x {e:,}: {name}")
        seconds, memory, cosines[name] = _apart(search, candidates, existing)
        rate = q * e / seconds
        rows.append(
            {
                "search": name,
                "candidates": q,
                "existing": e,
                "seconds": seconds,
                "peak MB": memory / 1e6,
                "M products/s": rate / 1e6,
                "hours for 1M x 10M": TARGET / rate / 3600,
                "largest difference": float(np.abs(cosines[name] - cosines["ours"]).max()),
            }
        )
    return rows


def _apart(search: Callable[..., Any], *paths: Path) -> tuple[float, int, np.ndarray]:
    """(seconds, peak memory in bytes, result) of a search in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (search, *paths))


def _measure(search: Callable[..., Any], *paths: Path) -> tuple[float, int, np.ndarray]:
    small = np.load(paths[0], mmap_mode="r")[:64]
    highest_cosine(small, [small])  # libraries load their parts
    before = _peak()
    start = time.perf_counter()
    result = search(*paths)
    return time.perf_counter() - start, _peak() - before, result


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _features(folder: Path, n: int) -> Path:
    path = folder / f"{n}.npy"
    rows: np.ndarray = open_memmap(path, "w+", np.float32, (n, DIM))  # type: ignore[no-untyped-call]  # numpy's
    generator = np.random.default_rng(n)
    for i in range(0, n, 10_000):
        block = generator.standard_normal((min(10_000, n - i), DIM), np.float32)
        rows[i : i + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return path
