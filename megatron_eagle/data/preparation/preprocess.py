"""From a recipe to a token store, restartable at any point, with rows in the order of the input.

The new store grows in `.NAME.partial` beside its final place, what is finished of it is recorded in
`.NAME.journal`, and an earlier store is replaced when the new one is complete.  Indexes of archives are kept
in `.NAME.archives`, for the next run too.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_eagle.data.annotations import unknown_keys
from megatron_eagle.data.annotations.mixture import Dataset, read_recipe
from megatron_eagle.data.annotations.records import open_records
from megatron_eagle.data.media.remote.files import MediaAccess
from megatron_eagle.data.media.source import is_inline, member_ref, row_ref
from megatron_eagle.data.preparation.archives import remove_unpacked, with_archives
from megatron_eagle.data.preparation.engines import ENGINES, lines_ahead, ray_workers, run_local, run_ray
from megatron_eagle.data.preparation.journal import Journal
from megatron_eagle.data.preparation.line_numbers import LineNumbers
from megatron_eagle.data.preparation.mixed_order import mixed_takes
from megatron_eagle.data.preparation.processor import Outcome, PreprocessSettings
from megatron_eagle.data.preparation.publishing import Publisher
from megatron_eagle.data.preparation.recipe_input import RecipeInput
from megatron_eagle.data.preparation.reuse import FinishedLines, cache_key, is_current
from megatron_eagle.data.preparation.summary import LengthCounts
from megatron_eagle.data.store import media_files
from megatron_eagle.data.store.manifest import DataManifest, read_manifest, store_format
from megatron_eagle.data.store.media_names import FOLDER
from megatron_eagle.data.store.shards import SHARDS
from megatron_eagle.data.store.signs import SignOfLife, growing_folder, journal_folder
from megatron_eagle.data.store.token_file import TokenFileWriter
from megatron_eagle.data.store.writer import StoreWriter, write_tables
from megatron_eagle.data.text.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.prompt import END_OF_TEXT, IM_END, IMG_CONTEXT
from megatron_eagle.problems import LedgerEntry, Problem, write_ledger

SHARD = 512  # lines; what a kill makes a run repeat is never more (with many workers: twice `lines_ahead`)
MOST_SHARD_ROWS = 1 << 20
_CHUNK = 4  # lines per task of a worker: few, so that the bar moves also where every line is a long video
_COMMIT_SECONDS = 20.0


@dataclass(frozen=True)
class Execution:
    """How the work is done, which changes nothing in what comes out.

    Attributes:
        workers: processes; None: one per core of this machine or of the Ray cluster.
        fresh: ignore what earlier runs have left.
        retry_failed: try the lines of a finished store again that were dropped for their media, and only
            those.

    Raises:
        UserError: `engine` or `workers` cannot be.
    """

    workers: int | None = None
    engine: str = "local"
    fresh: bool = False
    shard: int = SHARD
    retry_failed: bool = False

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError(f"--engine must be one of {', '.join(ENGINES)}, got {self.engine}")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers must be at least 1, got {self.workers}")


def preprocess(
    recipe: str | Path,
    output: str | Path,
    settings: PreprocessSettings,
    execution: Execution | None = None,
    *,
    follow: int = 0,
) -> DataManifest:
    """Make the token store `output` (see `store`) from a recipe; replaces an earlier store there.

    A run that was interrupted, in whatever way, is continued; a store that is there already and follows from
    the same input is kept.  The same input gives the same bytes, however it was made.

    Args:
        follow: rows of a shard of a store that training may follow while it is made, with its rows in the
            order of `mixed_order`; 0: a store whose rows are in the order of the input.
    Raises:
        UserError: recipe, annotations, tokenizer, settings or output cannot be used, or another process makes
            this store.
    """
    execution = execution or Execution()
    output = Path(output).resolve()
    if not 0 <= follow <= MOST_SHARD_ROWS:
        raise UserError(f"--follow must be from 1 to {MOST_SHARD_ROWS:,}, got {follow}")
    datasets = read_recipe(recipe)
    manifest = _new_manifest(datasets, settings, follow)
    _check_output(output)
    partial, left = growing_folder(output), journal_folder(output)
    finished = None
    if not execution.fresh and (execution.retry_failed or not left.exists()):
        files = MediaAccess(settings.remote)
        finished = FinishedLines(output) if is_current(output, manifest.input_key, files) else None
    if finished and not left.exists() and not (execution.retry_failed and finished.failed):
        print(f"{output} is up to date: same input and settings, media unchanged; --fresh makes it again")
        if finished.failed:
            print(
                f"{len(finished.failed):,} lines were dropped for their media (dropped.jsonl); "
                "--retry-failed tries them again"
            )
        return read_manifest(output)
    for name, key in dict.fromkeys((dataset.name, key) for dataset in datasets for key in dataset.ignored):
        print(f'note: "{key}" of the recipe\'s entry "{name}" has no effect')
    archives = output.with_name(f".{output.name}.archives")
    datasets = with_archives(datasets, archives, execution.workers)
    records = [open_records(dataset.annotation, archives) for dataset in datasets]
    unknown_keys.check_first(datasets, records)
    copies = [dataset.copies(len(r)) for dataset, r in zip(datasets, records, strict=True)]
    source = RecipeInput(datasets, records, copies)
    if follow:
        source = replace(source, takes=mixed_takes(manifest.names, copies))
        manifest = replace(manifest, n_takes=len(source.takes or ()))
    with _continued(output, left, manifest.input_key, execution.fresh) as journal:
        if journal.n_lines and not partial.exists() and _has_key(output, manifest.input_key):
            journal.remove()  # killed between the last rename and this
            return read_manifest(output)
        whole = all(_holds(partial / str(length), journal.n_tokens(length)) for length in settings.lengths)
        if not whole or not media_files.holds(partial, journal.media):
            journal.clear()
        if not journal.n_lines:
            shutil.rmtree(partial, ignore_errors=True)
        with SignOfLife(output) if follow else nullcontext():
            _begin(partial)
            publisher = None
            if source.takes is not None:
                _show(partial, settings, manifest)
                n_lines = [len(counts) for counts in copies]
                publisher = Publisher(partial, journal, source.takes, settings.lengths, follow, n_lines)
                publisher.publish({})
            moved = _is_moved((output / FOLDER, archives))
            _write_tokens(source, partial, journal, settings, execution, finished, moved, publisher)
            _write_rest(source, partial, journal, settings, manifest)
            _replace(output, partial)
        for line in unknown_keys.summary(journal.dropped, datasets):
            print(line)
        journal.remove()
        remove_unpacked(archives)
    return manifest


def _new_manifest(datasets: list[Dataset], settings: PreprocessSettings, follow: int) -> DataManifest:
    tokenizer = load_tokenizer(settings.tokenizer)
    key = cache_key(datasets, settings, tokenizer.fingerprint)
    if follow:
        key = hashlib.sha256(f"{key} in shards of {follow}".encode()).hexdigest()
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
        names=[dataset.name for dataset in datasets],
        sampling=asdict(settings.sampling),
        max_pixels=settings.max_pixels,
        input_key=key,
        shard_rows=follow,
    )


def _pad_token_id(tokenizer: Tokenizer) -> int:
    """What fills the end of a pack, where nothing is learned: any id that is no image token does."""
    try:
        return tokenizer.token_id(END_OF_TEXT)
    except UserError:
        return tokenizer.token_id(IM_END)


def _begin(partial: Path) -> None:
    """Have the folder, without what is left of files that a kill kept from being complete."""
    partial.mkdir(parents=True, exist_ok=True)
    for file in partial.rglob(".*.partial"):
        file.unlink()


def _show(partial: Path, settings: PreprocessSettings, manifest: DataManifest) -> None:
    """Let readers see the store, and all that a run needs of it beside rows, before there is any row."""
    if not (partial / "manifest.json").exists():
        shutil.rmtree(partial / "tokenizer", ignore_errors=True)
        copy_tokenizer(settings.tokenizer, partial / "tokenizer")
        manifest.save(partial)


def _write_tokens(
    source: RecipeInput,
    partial: Path,
    journal: Journal,
    settings: PreprocessSettings,
    execution: Execution,
    finished: FinishedLines | None,
    is_moved: Callable[[str], bool],
    publisher: Publisher | None,
) -> None:
    """Process the lines that the journal does not have, appending to the token files and to the journal.

    What `finished` knows of them is taken from there.  Media that are to be moved go into the store's files.
    """
    lines = source.taken()
    writers = {
        length: StoreWriter(partial / str(length), journal.n_tokens(length)) for length in settings.lengths
    }
    media = media_files.MediaFiles(partial, journal.media)
    remaining = lines[journal.n_lines :]
    open_lines = remaining.among(finished.failed) if finished else remaining
    chunks = source.chunks(open_lines, _CHUNK)
    if execution.engine == "ray":
        available = ray_workers()
        workers = execution.workers or available
        outcomes = run_ray(chunks, settings, workers)
    else:
        workers = min(execution.workers or os.cpu_count() or 1, -(-len(open_lines) // _CHUNK))
        outcomes = run_local(chunks, settings, workers)
    # Half a shard between commits, and at most half a shard in work beyond them.
    per_commit = max(execution.shard // 2, lines_ahead(workers, _CHUNK) if workers > 1 else 0)
    if journal.n_lines:
        print(f"continuing: {journal.n_lines:,} of {len(lines):,} lines are done")
    if finished:
        print(f"trying {len(open_lines):,} lines again, the others are kept")
    progress = tqdm(
        _in_order(remaining, outcomes, finished) if finished else outcomes,
        total=len(lines),
        initial=journal.n_lines,
        desc="preprocess",
        unit=" samples",
        dynamic_ncols=True,
    )
    dropped: list[LedgerEntry] = []
    n_new = 0
    last_commit = time.monotonic()

    def commit() -> None:
        nonlocal n_new, last_commit
        rows = {length: writer.take_rows() for length, writer in writers.items()}
        media.sync()
        journal.commit(n_new, dropped, rows, media.position)
        if publisher is not None:
            publisher.publish(rows)
        dropped.clear()
        n_new, last_commit = 0, time.monotonic()

    try:
        for outcome in progress:
            dropped += outcome.dropped
            names: dict[str, str] = {}
            for length, row in outcome.rows.items():
                columns = media_files.taken_over(row.columns, media, is_moved, names)
                writers[length].add(row.ids, row.answers, columns)
            n_new += 1
            if n_new >= per_commit or time.monotonic() - last_commit > _COMMIT_SECONDS:
                commit()
        if n_new:
            commit()
        media.finish()
    except Problem as problem:  # what has just been read to its end
        raise UserError(f"{problem}; run the same command again, it continues where it stopped") from None
    finally:
        outcomes.close()
        for writer in writers.values():
            writer.close()
        media.close()


def _is_moved(folders: tuple[Path, ...]) -> Callable[[str], bool]:
    """Which media are moved into the new store's own files: those of tables and of records, what
    is compressed in archives, and those of archives in folders that do not stay."""

    def is_moved(path: str) -> bool:
        member = member_ref(path)
        if member is None:
            return is_inline(path) or row_ref(path) is not None
        return member.kind == "unzip" or Path(member.file).parent in folders

    return is_moved


def _in_order(lines: LineNumbers, tried: Iterator[Outcome], finished: FinishedLines) -> Iterator[Outcome]:
    """The outcome of every line: of those that are tried again the new one, of the others what it was."""
    for line in lines:
        yield next(tried) if line in finished.failed else finished.outcome(line)


def _write_rest(
    source: RecipeInput, partial: Path, journal: Journal, settings: PreprocessSettings, manifest: DataManifest
) -> None:
    """Everything but the tokens, from the journal: may be done again and again."""
    if source.takes is None:
        shutil.rmtree(partial / "tokenizer", ignore_errors=True)
        copy_tokenizer(settings.tokenizer, partial / "tokenizer")
    n_lines = sum(map(len, source.copies))
    not_taken = sum(int((count == 0).sum()) for count in source.copies)
    for length in settings.lengths:
        order = source.final_rows(journal.column(length, "source"), journal.column(length, "line"))
        write_tables(partial / str(length), journal.tables(length), order)
        counts = LengthCounts.of(journal.tables(length), journal.dropped, length)
        counts.input, counts.not_taken = n_lines, not_taken
        counts.rows = counts.kept if order is None else len(order)
        manifest.counts[str(length)] = asdict(counts)
    write_ledger(partial / "dropped.jsonl", journal.dropped)
    manifest.files.update(_file_hashes(partial))
    manifest.save(partial)


@contextmanager
def _continued(output: Path, folder: Path, key: str, fresh: bool) -> Iterator[Journal]:
    """The journal, in `folder`, of what an interrupted run has done towards `output`.

    An error or an interruption leaves it for the next run.
    """
    old = output.with_name(f".{output.name}.old")
    journal = None
    try:
        journal = Journal(folder, key, fresh)
        if old.exists() and not output.exists():  # killed between the two renames of `_replace`
            old.rename(output)
        shutil.rmtree(old, ignore_errors=True)
        yield journal
    except OSError as error:
        raise UserError(
            f"cannot write {output}: {error.strerror or error}; when that is mended run the same command "
            "again, it continues where it stopped"
        ) from None
    finally:
        if journal is not None:
            journal.close()


def _has_key(output: Path, key: str) -> bool:
    return output.exists() and read_manifest(output).input_key == key


def _holds(folder: Path, n_tokens: int) -> bool:
    """Whether the token files of one length have all tokens that the journal tells of."""
    files = (("tokens", np.int32), ("answers", np.uint16))
    return all(TokenFileWriter.n_elements(folder / name, dtype) >= n_tokens for name, dtype in files)


def _replace(output: Path, partial: Path) -> None:
    old = output.with_name(f".{output.name}.old")
    if output.exists():
        output.rename(old)
    partial.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _check_output(output: Path) -> None:
    """Let pass what is a token store, of whatever format, or will be one.

    Raises:
        UserError: the place holds something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        store_format(output)
    except UserError:
        raise UserError(
            f"{output} exists and holds something else than a token store; choose another --output"
        ) from None


def _file_hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of a store's files, by relative path, but for the manifest and the shards, which have
    digests of their own."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    paths = [path for path in files if path.name != "manifest.json" and path.parent.name != SHARDS]

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        hashes = pool.map(digest, paths)
        return {
            str(path.relative_to(folder)): {"bytes": os.path.getsize(path), "sha256": own}
            for path, own in zip(paths, hashes, strict=True)
        }
