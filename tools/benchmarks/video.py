"""Video readers: frames that are the right ones, CPU time and memory; ours beside every reader installed.

The clips are made here: 480x272, a moving texture, H.264 unless said otherwise; every frame shows its number.
Frames are wanted in the middles of equal pieces, as tiles of 448 pixels.  CPU seconds begin with opening
the file: finding the frames is part of them.  A reader's process is alone in its memory: its peak is counted
beyond what it had after a first, small clip, and beyond the tensor it returns.
"""

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import Report, progress
from benchmarks.video_clips import LONG, SHORT, Clip, make_clip
from benchmarks.video_readers import installed, measure

from megatron_eagle.data.media.frame_index import demux, read_frame_table

_REPEATS, _ENOUGH = 5, 4.0  # runs of each reader, fewer once they have taken this many CPU seconds
_MANY = ("ours", "torchcodec", "decord")  # who is asked for 512 frames; the others take minutes


def wanted_frames(clip: Clip, count: int) -> list[int]:
    """The middles of `count` equal pieces."""
    return [(2 * i + 1) * clip.n_frames // (2 * count) for i in range(count)]


def run_reader(reader: str, warm_up: Path, path: Path, numbers: list[int]) -> dict[str, Any] | str:
    """One measurement in a new process, which inherits what is imported here; or why there is none."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(measure, reader, str(warm_up), str(path), numbers).result()
        except Exception as error:  # whatever a reader raises, or a process that died, is a result
            return f"{type(error).__name__}: {error}"[:200]


def compare(clip: Clip, path: Path, warm_up: Path, count: int, readers: list[str]) -> list[dict[str, Any]]:
    """A row for each reader; they take turns, so that noise meets all of them alike."""
    numbers = wanted_frames(clip, count)
    expected = [number % clip.n_numbers for number in numbers]
    runs: dict[str, list[dict[str, Any]]] = {reader: [] for reader in readers}
    failures: dict[str, str] = {}
    for _ in range(_REPEATS):
        for reader in readers:
            if reader in failures or sum(run["cpu"] for run in runs[reader]) > _ENOUGH:
                continue
            result = run_reader(reader, warm_up, path, numbers)
            if isinstance(result, str):
                failures[reader] = result
            else:
                runs[reader].append(result)
    rows = []
    ours = [run["cpu"] for run in runs.get("ours", [])]
    for reader in readers:
        row = {"clip": clip.name, "frames": count, "reader": reader}
        if reader in failures:
            progress(f"{clip.name}, {count} frames, {reader}: {failures[reader]}")
            rows.append({**row, **dict.fromkeys(("right", "CPU s", "x ours", "peak MB", "runs"), "failed")})
            continue
        done = runs[reader]
        seconds = median(run["cpu"] for run in done)
        row |= {
            "right": min(sum(map(int.__eq__, run["shown"], expected)) for run in done),
            "CPU s": seconds,
            "x ours": seconds / median(ours) if ours else "",
            "peak MB": median(run["peak"] for run in done) / 1e6,
            "runs": len(done),
        }
        rows.append(row)
    return rows


def index_row(clip: Clip, path: Path) -> dict[str, Any]:
    """The frame table alone: ours, and what reading all packets takes."""
    seconds = {}
    for name, read in (("ours", read_frame_table), ("packets", demux)):
        times = []
        for _ in range(_REPEATS):
            start = time.process_time()
            read(str(path))
            times.append(time.process_time() - start)
        seconds[name] = median(times)
    return {
        "clip": clip.name,
        "frames": clip.n_frames,
        "reader": "ours, frame table alone",
        "right": "",
        "CPU s": seconds["ours"],
        "x ours": seconds["packets"] / seconds["ours"],
        "peak MB": "",
        "runs": _REPEATS,
    }


def versions() -> str:
    """What was measured."""
    found = {}
    for package in ("av", "torchcodec", "decord", "opencv-python-headless", "opencv-python"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return ", ".join(f"{package} {version}" for package, version in found.items())


def run(large: bool = False, clips: str | None = None) -> Report:
    """Measure every installed reader on every clip; they are kept in the folder `clips` if there is one."""
    rows = []
    with tempfile.TemporaryDirectory() if clips is None else nullcontext(clips) as name:
        folder = Path(name)
        warm_up = make_clip(folder, Clip("warm-up", 2 / 60, 25))
        for clip in SHORT + (LONG if large else ()):
            progress(f"making {clip.name}")
            path = make_clip(folder, clip)
            for count in (32,) if clip in SHORT else (8, 32) if clip.repeats == 1 else (128, 512):
                progress(f"{clip.name}: {count} frames")
                readers = [name for name in installed() if count < 512 or name in _MANY]
                rows += compare(clip, path, warm_up, count, readers)
            rows.append(index_row(clip, path))
    title = (
        "frames of 480x272 clips as tiles of 448 pixels; one thread; median of up to 5 runs; "
        "'frame table alone': x ours is reading all packets; " + versions()
    )
    return Report(title, rows, "--large" * large)
