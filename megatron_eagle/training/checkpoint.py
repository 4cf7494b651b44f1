"""Checkpoints that any layout can read: Megatron's distributed format, written completely or not at all.

    C/latest_checkpointed_iteration.txt   the iteration to load, written last
    C/iter_0000120/                       common.pt, .metadata, __*.distcp, metadata.json (Megatron)
                                          run.yaml    the run's configuration, resolved
                                          state.json  {"iteration": ..., "consumed_packs": ...}
                                          manifest.json  size and SHA-256 of every other file
    C/hf/                                 what an export to Hugging Face needs and training does not touch

Keys in a checkpoint do not know ranks: layers carry their global index, tensors their global shape,
optimizer state is stored per parameter (`fully_reshardable`). Saving goes to a hidden folder beside the
target, which is renamed when every file is on disk; the tracker follows. A process killed at any point, or a
disk that is full, leaves the last checkpoint loadable. There is no random state: training draws no random
numbers (no dropout; the data order is a function of the seed and of `consumed_packs`).

Reading executes nothing from the files: `torch.load` runs weights-only, no pickled objects are requested, and
the index (`.metadata`, a pickle) may only name the classes torch writes into it.
"""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed import checkpoint as torch_checkpoint

from megatron_eagle.config import from_dict, load_yaml, save_yaml, to_dict
from megatron_eagle.data.store import read_manifest
from megatron_eagle.errors import UserError
from megatron_eagle.model.lora import LoraConfig
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.training.agreement import AgreedError, raise_together
from megatron_eagle.training.manifest import hash_written, verify, write_manifest

TRACKER = "latest_checkpointed_iteration.txt"
HF_FOLDER = "hf"

# What Megatron is told of every checkpoint, when it saves and when it loads.
CONTENT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass
class CheckpointConfig:
    """Where a run saves, resumes and starts from.

    `path` is saved to, and resumed from if it holds a checkpoint; otherwise `load` gives the initial weights
    (null: fresh ones). The last iteration is always saved, and every `save_interval` iterations before it.
    `keep_last` deletes older ones after a save (null: none). `verify` reads a checkpoint twice on loading:
    first to compare every file with its manifest.
    """

    path: str
    load: str | None = None
    save_interval: int | None = None
    keep_last: int | None = None
    verify: bool = True

    def __post_init__(self) -> None:
        for name in ("save_interval", "keep_last"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass
class TrainState:
    """Where a run stands: finished iterations, packs read (the whole state of the data loader)."""

    iteration: int = 0
    consumed_packs: int = 0
    recent_losses: list[float] = field(default_factory=list)  # what a loss spike is measured against


def has_checkpoint(root: str | Path) -> bool:
    """Whether a checkpoint was ever completed in `root`."""
    return (Path(root) / TRACKER).is_file()


def checkpoint_folder(root: str | Path) -> Path:
    """The folder of the latest complete checkpoint in `root`. Raises `UserError` if there is none."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected a checkpoint (a folder with {TRACKER})")
    if not has_checkpoint(root):
        inside = root.name.startswith("iter_") and has_checkpoint(root.parent)
        advice = f"; name its parent {root.parent}" if inside else ""
        raise UserError(f"{root}: not a checkpoint, it has no {TRACKER}{advice}")
    text = (root / TRACKER).read_text().strip()
    if not text.isdecimal():
        raise UserError(f"{root / TRACKER}: expected an iteration number, found {text[:40]!r}")
    folder = _iteration_folder(root, int(text))
    for name in ("metadata.json", ".metadata", "common.pt", "run.yaml", "state.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: incomplete checkpoint, {name} is missing; copy it again in full")
    return folder


def read_model_config(root: str | Path) -> EagleConfig:
    """The model configuration that the latest checkpoint in `root` was saved with."""
    run_file = checkpoint_folder(root) / "run.yaml"
    model = load_yaml(run_file).get("model")
    if model is None:
        raise UserError(f"{run_file}: no model section; the checkpoint was not written by this project")
    return from_dict(EagleConfig, model, f"{run_file}: model")


def read_lora_config(root: str | Path) -> LoraConfig | None:
    """The adapters on the latest checkpoint's language model, which stay apart from its weights."""
    run_file = checkpoint_folder(root) / "run.yaml"
    section = load_yaml(run_file).get("lora")
    return None if section is None else from_dict(LoraConfig, section, f"{run_file}: lora")


def read_train_state(root: str | Path) -> TrainState:
    """Iteration and data position of the latest checkpoint in `root`."""
    file = checkpoint_folder(root) / "state.json"
    try:
        return from_dict(TrainState, json.loads(file.read_text()), str(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from error


def save_checkpoint(
    root: str | Path,
    *,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    run_config: Any = None,
    model_config: EagleConfig | None = None,
    iteration: int = 0,
    consumed_packs: int = 0,
    recent_losses: Sequence[float] = (),
    keep_last: int | None = None,
) -> Path:
    """Save this iteration and make it the latest. Collective over all ranks; returns the checkpoint's folder.

    `models` are this rank's chunks, wrapped or not. `run_config` is any configuration with a `model` section
    (dataclass or mapping); a tool without a run gives only `model_config`. `keep_last`: afterwards, of the
    checkpoints up to this one, all but so many are deleted.
    Raises `AgreedError` where `root` cannot be written (a full disk: what was written is removed, the latest
    checkpoint stays) or its latest checkpoint is this very iteration (it is never overwritten in place).
    """
    root, rank = Path(root), torch.distributed.get_rank()
    target = _iteration_folder(root, iteration)
    partial = root / f".{target.name}.saving"
    raise_together(_prepare(root, target, partial) if rank == 0 else None)

    content = _content(models, optimizer, loading=False)
    if optimizer is not None:
        _share_step(content["optimizer"])
    if scheduler is not None:
        content["scheduler"] = scheduler.state_dict()
    problem = _write_tensors(content, partial)
    hashed = {} if problem else hash_written(partial)
    if rank == 0:
        try:
            if problem is None:
                run = to_dict(run_config) if run_config is not None else {"model": to_dict(model_config)}
                save_yaml(run, partial / "run.yaml")
                state = TrainState(iteration, consumed_packs, list(recent_losses))
                (partial / "state.json").write_text(json.dumps(to_dict(state)))
                write_manifest(partial, hashed)
                _publish(root, target, partial, iteration)
        except OSError as error:
            problem = _reason(error)
        if problem is not None:
            shutil.rmtree(partial, ignore_errors=True)  # gives a full disk its space back
            problem = f"{root}: iteration {iteration} could not be saved: {problem}; {_stays(root)}"
    raise_together(problem)
    if rank == 0 and keep_last is not None:
        _retain(root, iteration, keep_last)
    return target


def load_checkpoint(
    root: str | Path,
    *,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    verify_files: bool = True,
) -> TrainState:
    """Load the latest checkpoint in `root` into this layout, whatever layout wrote it. Collective.

    Weights only without `optimizer`. Learning rate, decay and the like stay those of the running
    configuration; a checkpoint brings weights, moments and the step.
    Raises `UserError`: no checkpoint there, a file that differs from the manifest (unless `verify_files` is
    false), or tensors that are not exactly the model's (names are given).
    """
    folder = checkpoint_folder(root)
    if verify_files:
        verify(folder)
    if optimizer is not None:
        settings = [dict(group) for group in optimizer.param_groups]
    content = _content(models, optimizer, loading=True)
    raise_together(_check_keys(folder, content, with_optimizer=optimizer is not None))
    loaded = _read_tensors(folder, content)

    for name, model in _named(models):
        missing, unexpected = model.load_state_dict(loaded[name], strict=False)
        wrong = [key for key in (*missing, *unexpected) if not key.endswith("_extra_state")]
        if wrong:
            raise AgreedError(f"{folder}: tensors that do not fit the model: {_some(wrong)}")
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        for group, kept in zip(optimizer.param_groups, settings, strict=True):
            group.update({k: v for k, v in kept.items() if k not in ("params", "step")})
    if scheduler is not None:
        scheduler.load_state_dict(loaded["scheduler"])
    return read_train_state(root)


def save_hf_folder(root: str | Path, *, checkpoint: str | Path | None, data: str | Path) -> None:
    """Give `root` its `hf/` folder, if it has none: that of `checkpoint`, else the tokenizer and the tile
    limit of `data`.

    Collective. Raises `UserError` if neither source exists or `root` cannot be written.
    """
    problem = None
    if torch.distributed.get_rank() == 0 and not (Path(root) / HF_FOLDER).exists():
        source = Path(data) / "tokenizer" if checkpoint is None else Path(checkpoint) / HF_FOLDER
        partial = Path(root) / f".{HF_FOLDER}.saving"
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            if checkpoint is None:
                limits = {"max_dynamic_tiles": read_manifest(data).sampling["max_tiles"]}
                (partial / "preprocessor_config.json").write_text(json.dumps(limits))
            partial.rename(Path(root) / HF_FOLDER)
        except OSError as error:
            problem = f"{root}: cannot give the checkpoint a copy of {source}: {error}"
    raise_together(problem)


def _iteration_folder(root: Path, iteration: int) -> Path:
    return root / f"iter_{iteration:07d}"


def _prepare(root: Path, target: Path, partial: Path) -> str | None:
    """Make `partial` an empty folder; on rank 0. Returns what is wrong."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if has_checkpoint(root) and checkpoint_folder(root) == target:
            return f"{root}: already holds iteration {int(target.name[5:])}; choose another folder"
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        partial.mkdir()
    except OSError as error:
        return f"{root}: cannot write a checkpoint here: {error}"
    except UserError as error:
        return str(error)
    return None


def _write_tensors(content: dict, partial: Path) -> str | None:
    """What `dist_checkpointing.save` writes. Collective; returns what went wrong on any rank, on all ranks.

    Megatron's function would leave the other ranks waiting if rank 0 cannot write its common file.
    """
    content["content_metadata"] = dict(CONTENT_METADATA)
    sharded, common = save_preprocess(content)
    problem = None
    if torch.distributed.get_rank() == 0:
        try:
            torch.save(common, partial / COMMON_STATE_FNAME)
            save_config(CheckpointingConfig("torch_dist", 1), str(partial))
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's own writer
            problem = _reason(error)
    try:
        raise_together(problem)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(by_key, False),
            # With fsync, in this process: Megatron's own writer is made for asynchronous saves, it spawns a
            # helper that imports everything again.
            storage_writer=torch_checkpoint.FileSystemWriter(partial, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
    except AgreedError as error:
        return str(error)
    except torch_checkpoint.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(cause)}"
    return None


def _reason(error: BaseException) -> str:
    """What the system says, in one line."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def _stays(root: Path) -> str:
    """What can still be loaded, for messages."""
    if not has_checkpoint(root):
        return "there is no earlier checkpoint"
    return f"iteration {read_train_state(root).iteration} stays the latest checkpoint"


def _retain(root: Path, iteration: int, keep_last: int) -> None:
    """Delete all but `keep_last` of the checkpoints up to `iteration`; on rank 0.

    A folder loses its name before its files, so that a half-deleted one is never taken for a checkpoint. What
    cannot be deleted stays: a run does not end for that.
    """
    saved = sorted(root.glob("iter_*"), key=lambda folder: folder.name)
    upto = [folder for folder in saved if folder.name <= _iteration_folder(root, iteration).name]
    for folder in upto[:-keep_last]:
        with contextlib.suppress(OSError):
            folder.rename(root / f".{folder.name}.deleting")
    for folder in root.glob(".iter_*.deleting"):  # also what a killed process left
        shutil.rmtree(folder, ignore_errors=True)


def _publish(root: Path, target: Path, partial: Path, iteration: int) -> None:
    """Make the complete folder `partial` the latest checkpoint; on rank 0."""
    for file in (*partial.iterdir(), partial):
        _sync(file)
    shutil.rmtree(target, ignore_errors=True)  # saved before, and then abandoned for an earlier iteration
    partial.rename(target)
    _sync(root)
    tracker = root / f".{TRACKER}.saving"
    tracker.write_text(f"{iteration}\n")
    _sync(tracker)
    tracker.replace(root / TRACKER)
    _sync(root)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _named(models: Sequence[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """Model chunks without wrappers. The name only tells the chunks of this rank apart: keys in the
    checkpoint carry global layer numbers, so chunks of another pipeline layout find theirs."""
    unwrapped = []
    for index, model in enumerate(models):
        while not hasattr(model, "sharded_state_dict") or hasattr(model, "ddp_config"):
            model = model.module
        unwrapped.append((f"model{index}", model))
    return unwrapped


def _content(models: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, loading: bool) -> dict:
    """Megatron's description of what this rank holds: tensors with their global key, shape and place."""
    content: dict[str, Any] = {}
    for name, model in _named(models):
        tensors = model.sharded_state_dict(metadata=dict(CONTENT_METADATA))
        # TransformerEngine adds pickled `_extra_state` objects (FP8 scales). Without them a checkpoint is
        # tensors only and fits specs with and without TransformerEngine.
        content[name] = {k: v for k, v in tensors.items() if not isinstance(v, ShardedObject)}
    if optimizer is not None:
        # Megatron adds to the metadata it is given: hand out copies.
        content["optimizer"] = optimizer.sharded_state_dict(
            dict(content), is_loading=loading, metadata=dict(CONTENT_METADATA)
        )
        if not content["optimizer"]["param_state"]:
            del content["optimizer"]["param_state"]  # nothing trains on this rank
    return content


def _share_step(optimizer_content: dict) -> None:
    """A rank without trainable parameters has no step of its own; common content must agree everywhere."""
    groups = optimizer_content["optimizer"]["param_groups"]
    steps = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(steps, max((group.get("step") or 0 for group in groups), default=0))
    for group in groups:
        group["step"] = max(steps)


def _check_keys(folder: Path, content: dict, with_optimizer: bool) -> str | None:
    """Compare what all ranks ask for with what the checkpoint holds. Collective; returns what is wrong."""
    try:
        stored = read_index(folder).state_dict_metadata
        problem = None
    except UserError as error:
        stored, problem = {}, str(error)
    wanted = {
        tensor.key: tuple(tensor.global_shape)
        for tensor in _sharded_tensors(content)
        if not tensor.allow_shape_mismatch
    }
    flexible = {tensor.key for tensor in _sharded_tensors(content) if tensor.allow_shape_mismatch}
    gathered: list[tuple[set[str], str | None]] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (flexible | wanted.keys(), problem))
    if problem:
        return problem
    if any(other for _, other in gathered):
        return None  # that rank reports
    asked = set().union(*(keys for keys, _ in gathered))
    # An export or a start from weights leaves the optimizer's tensors unread on purpose.
    available = {key for key in stored if with_optimizer or not key.startswith("optimizer.")}
    if asked - available:
        kind = "optimizer state" if all(k.startswith("optimizer.") for k in asked - available) else "weights"
        return f"{folder}: the checkpoint lacks {kind} that the run needs: {_some(asked - available)}"
    if available - asked:
        return f"{folder}: the checkpoint holds tensors that the model lacks: {_some(available - asked)}"
    for key, shape in wanted.items():
        size = tuple(getattr(stored[key], "size", ()))
        if size != shape:
            return f"{folder}: {key} has shape {size}, the model's is {shape}: another architecture"
    return None


def _read_tensors(folder: Path, content: dict) -> dict:
    """Megatron's load, with what can be wrong with the files said in one line. Every rank sees the error."""
    try:
        return dist_checkpointing.load(content, str(folder))
    except pickle.UnpicklingError as error:
        problem = f"{folder / 'common.pt'}: damaged, or it holds more than plain values; not loaded"
        raise AgreedError(problem) from error
    except torch_checkpoint.CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = str(cause).partition("\n")[0]
        raise AgreedError(f"{folder}: a file of tensors is damaged (rank {rank}: {reason})") from error


def _sharded_tensors(value: Any) -> Iterable[ShardedTensor]:
    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, ShardedTensorFactory):
        yield from _sharded_tensors(value.build())
    elif isinstance(value, dict):
        for item in value.values():
            yield from _sharded_tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _sharded_tensors(item)


def _some(keys: Iterable[str], limit: int = 4) -> str:
    names = sorted(keys)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


class _IndexUnpickler(pickle.Unpickler):
    """Reads torch's `.metadata` index: plain records of names, shapes, types and places, and nothing else."""

    ALLOWED = {
        "torch": {"Size"},  # and the dtypes
        "torch.serialization": {"_get_layout"},  # maps a layout's name to the layout
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "pathlib": {"PosixPath"},
        "pathlib._local": {"PosixPath"},  # from Python 3.13 on
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_index(folder: Path) -> Any:
    """The checkpoint's table of tensors. Also guards Megatron's own, unrestricted read of the same file."""
    try:
        with open(folder / ".metadata", "rb") as file:
            return _IndexUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
        raise UserError(
            f"{folder / '.metadata'}: not a checkpoint's index, or a damaged one: {error}"
        ) from error
