"""From a recipe to a token store: lines go to worker processes, rows come back in the order of the input."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_eagle.data.ledger import LedgerEntry, write_ledger
from megatron_eagle.data.processor import Outcome, PreprocessSettings, SampleProcessor, Task
from megatron_eagle.data.recipe import Dataset, line_bounds, read_recipe
from megatron_eagle.data.store import DataManifest, StoreWriter, read_manifest
from megatron_eagle.data.summary import LengthCounts
from megatron_eagle.data.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IMG_CONTEXT,
    Tokenizer,
    copy_tokenizer,
    load_tokenizer,
)
from megatron_eagle.errors import UserError

_CHUNK = 4  # lines per task of a worker: few, so that the bar moves also where every line is a long video


def preprocess(
    recipe: str | Path, output: str | Path, settings: PreprocessSettings, workers: int
) -> DataManifest:
    """Make the token store `output` (see `store`) from a recipe; replaces an earlier store there.

    The output appears when it is complete: it is written beside its final place and then moved.  The same
    input gives the same bytes, whatever `workers` is.  Raises `UserError`.
    """
    if workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}")
    datasets = read_recipe(recipe)
    manifest = _new_manifest(datasets, settings)
    bounds = [line_bounds(dataset.annotation) for dataset in datasets]
    copies = [dataset.copies(len(b) - 1) for dataset, b in zip(datasets, bounds, strict=True)]
    for dataset in datasets:
        for key in dataset.ignored:
            print(f'note: "{key}" of the recipe\'s entry "{dataset.name}" has no effect')
    with _replaced_folder(Path(output)) as folder:
        copy_tokenizer(settings.tokenizer, folder / "tokenizer")
        writers = {length: StoreWriter(folder / str(length)) for length in settings.lengths}
        counts = {length: LengthCounts() for length in settings.lengths}
        row_copies: dict[int, list[int]] = {length: [] for length in settings.lengths}
        row_sources: dict[int, list[int]] = {length: [] for length in settings.lengths}
        ledger: list[LedgerEntry] = []
        tasks = list(_taken_lines(copies))
        read = (_tasks(datasets, bounds, tasks[i : i + _CHUNK]) for i in range(0, len(tasks), _CHUNK))
        outcomes = _run(read, settings, min(workers, -(-len(tasks) // _CHUNK)))
        progress = tqdm(outcomes, total=len(tasks), desc="preprocess", unit=" samples", dynamic_ncols=True)
        for (source, line), outcome in zip(tasks, progress, strict=True):
            ledger += outcome.dropped
            for length, row in outcome.rows.items():
                writers[length].add(row.ids, row.answers, row.columns)
                counts[length].add(row.columns)
                row_copies[length].append(copies[source][line])
                row_sources[length].append(source)
        n_lines = sum(map(len, copies))
        for length, writer in writers.items():
            rows = _repeated(np.array(row_sources[length]), np.array(row_copies[length]))
            writer.close(None if len(rows) == writer.n_rows else rows)
            manifest.counts[str(length)] = counts[length].finish(
                n_lines, n_lines - len(tasks), len(rows), ledger, length
            )
        write_ledger(folder / "dropped.jsonl", ledger)
        manifest.files.update(_file_hashes(folder))
        manifest.save(folder)
    return manifest


def _new_manifest(datasets: list[Dataset], settings: PreprocessSettings) -> DataManifest:
    tokenizer = load_tokenizer(settings.tokenizer)
    image_token_id = tokenizer.token_id(IMG_CONTEXT)
    identity = [tokenizer.fingerprint, settings.template, settings.tokens_per_tile]
    return DataManifest(
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        template=settings.template,
        tile_size=settings.sampling.tile_size,
        patch_size=settings.patch_size,
        tokens_per_tile=settings.tokens_per_tile,
        vocab_size=tokenizer.vocab_size,
        image_token_id=image_token_id,
        pad_token_id=_pad_token_id(tokenizer),
        lengths=list(settings.lengths),
        sources=[str(dataset.annotation) for dataset in datasets],
        sampling=asdict(settings.sampling),
        max_pixels=settings.max_pixels,
    )


def _pad_token_id(tokenizer: Tokenizer) -> int:
    """What fills the end of a pack, where nothing is learned: any id that is no image token does."""
    try:
        return tokenizer.token_id(END_OF_TEXT)
    except UserError:
        return tokenizer.token_id(IM_END)


def _taken_lines(copies: list[np.ndarray]) -> Iterator[tuple[int, int]]:
    """(data set, 0-based line) of every line that is taken at least once, in the order of the input."""
    for source, count in enumerate(copies):
        for line in np.flatnonzero(count).tolist():
            yield source, line


def _tasks(datasets: list[Dataset], bounds: list[np.ndarray], lines: list[tuple[int, int]]) -> list[Task]:
    """Read the bytes of some lines."""
    tasks = []
    for source, line in lines:
        dataset = datasets[source]
        with dataset.annotation.open("rb") as file:
            file.seek(bounds[source][line])
            raw = file.read(bounds[source][line + 1] - bounds[source][line])
        tasks.append(Task(raw, source, str(dataset.annotation), line + 1, dataset.root, dataset.overrides))
    return tasks


def _repeated(sources: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Final rows as numbers of written rows: a data set once, then what it repeats, and so on."""
    passes = []
    for source in np.unique(sources):
        rows = np.flatnonzero(sources == source)
        passes += [rows[copies[rows] > k] for k in range(copies[rows].max())]
    return np.concatenate(passes) if passes else np.zeros(0, np.int64)


def _run(chunks: Iterable[list[Task]], settings: PreprocessSettings, workers: int) -> Iterator[Outcome]:
    """Outcomes in the order of the tasks; with one worker in this process."""
    if workers <= 1:
        processor = SampleProcessor(settings)
        for chunk in chunks:
            yield from map(processor.process, chunk)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the tokenizer's threads half-alive
    with ProcessPoolExecutor(workers, context, _start_worker, (settings,)) as pool:
        chunks = iter(chunks)
        waiting = deque(pool.submit(_work, chunk) for chunk in islice(chunks, 4 * workers))
        try:
            while waiting:
                yield from waiting.popleft().result()
                waiting.extend(pool.submit(_work, chunk) for chunk in islice(chunks, 1))
        except BrokenProcessPool:
            raise UserError(
                "a worker process died, probably for want of memory; try fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(settings: PreprocessSettings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _work.processor = SampleProcessor(settings)


def _work(tasks: list[Task]) -> list[Outcome]:
    return [_work.processor.process(task) for task in tasks]


@contextmanager
def _replaced_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `output` when the block ends without an error.

    What an interrupted earlier run left beside `output` is put right first.
    """
    output = output.resolve()
    partial, old = (output.with_name(f".{output.name}.{state}") for state in ("partial", "old"))
    if old.exists() and not output.exists():
        old.rename(output)
    if output.exists() and not _may_replace(output):
        raise UserError(
            f"{output} exists and holds something else than a token store; choose another --output"
        )
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write {output}: {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if output.exists():
        output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _may_replace(output: Path) -> bool:
    if not output.is_dir():
        return False
    if not any(output.iterdir()):
        return True
    try:
        read_manifest(output)
    except UserError:
        return False
    return True


def _file_hashes(folder: Path) -> dict[str, dict]:
    """Bytes and SHA-256 of every file in a folder, by relative path."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            hashes[str(path.relative_to(folder))] = {"bytes": os.path.getsize(path), "sha256": digest}
    return hashes
