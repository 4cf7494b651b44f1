"""Look at all that a run will need, in one process and without a GPU, before its job waits for nodes."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megatron_eagle.data.loading.follow import FollowedPacks
from megatron_eagle.data.loading.loader import open_packs
from megatron_eagle.data.media.decoder import choose_decoder
from megatron_eagle.data.packing.index import read_packs
from megatron_eagle.data.store.reader import SampleStore
from megatron_eagle.data.store.shards import ShardStore
from megatron_eagle.errors import UserError
from megatron_eagle.training.evaluation import count_batches
from megatron_eagle.training.run_config import RunConfig
from megatron_eagle.training.setup import check_new_logs, choose_libraries


def check_runs(configs: Sequence[RunConfig], processes: int) -> list[str]:
    """What each run (or stage) is, in a line, and its notes. `load_stages` makes the configurations,
    for `processes` processes.

    Raises:
        UserError: what reading the configuration cannot find: no pack index for the run's length or one of
            other data, too few packs to evaluate on, a library that is not installed, a folder that cannot be
            written or that holds another run's logs.
    """
    return [line for config in configs for line in _check(config, processes)]


def _check(config: RunConfig, processes: int) -> list[str]:
    check_new_logs(config)
    data, training, parallel = config.data, config.training, config.layout
    read = _data(config)
    if config.evaluation is not None:
        held_out = read_packs(SampleStore(config.evaluation.data, data.length))
        count_batches(config.evaluation, len(held_out), training.global_batch_size)
    for folder in (config.checkpoint.path, config.logging.path or config.checkpoint.path):
        _check_writable(Path(folder))
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "DP": parallel.data_parallel_size(processes),
    }
    layout = " x ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "one process"
    ulysses = parallel.ulysses_parallel_size
    if data.packs_per_sequence > 1:
        layout += f", {data.packs_per_sequence} packs a sequence"
    if ulysses > 1:
        layout += f", heads over {ulysses} ranks"
    if parallel.key_comm != "auto" and parallel.context_parallel_size > ulysses:
        layout += f", keys by {parallel.key_comm}"
    summary = (
        f"{layout}; {training.train_iterations} iterations of {training.global_batch_size} x {data.length} "
        f"tokens, {read}"
    )
    notes = [*config.notes, *_check_libraries(config)]
    return [f"{config.checkpoint.path}: {line}" for line in (summary, *notes)]


def _data(config: RunConfig) -> str:
    """How much of which data the run reads."""
    data, training = config.data, config.training
    wanted = training.train_iterations * training.global_batch_size
    store, packs = open_packs(data)
    if not isinstance(packs, FollowedPacks):
        return f"{wanted / len(packs):.2f} epochs of {data.path}"
    assert isinstance(store, ShardStore), "it is followed"
    there = f"following {data.path}, of which {store.shards_there} of {store.n_shards} shards are there"
    if not packs.reach(1):
        return f"{there}; the run would wait for {packs.awaited()}"
    rows = int(packs.column("n_samples", np.arange(len(packs))).sum())
    epochs = wanted / len(packs) * rows / store.manifest.n_takes
    return f"{there}; about {epochs:.2f} epochs, judged by its first window"


def _check_libraries(config: RunConfig) -> list[str]:
    """On a machine with a GPU, what the run will find there; without, a note of what only a GPU can tell."""
    choose_decoder(config.data.decoder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        choose_libraries(config)
    except UserError as error:
        if torch.cuda.is_available():
            raise
        return [f"not known without a GPU; here the run would end: {error}"]
    return []


def _check_writable(folder: Path) -> None:
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"{folder}: cannot be written: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot be written: no permission in {there}")
