"""Loading: the latest checkpoint into whatever layout this job has.

Reading executes nothing from the files: `torch.load` runs weights-only, no pickled objects are requested, and
the index may only name the classes torch writes into it.
"""

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_eagle.checkpoint.content import content_to_load, sharded_tensors, unwrapped
from megatron_eagle.checkpoint.folder import TrainState, checkpoint_folder, read_train_state
from megatron_eagle.checkpoint.index import read_index
from megatron_eagle.checkpoint.manifest import verify_together
from megatron_eagle.errors import UserError
from megatron_eagle.runtime.agreement import AgreedError, raise_together


def load_checkpoint(
    root: str | Path,
    *,
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    scheduler: OptimizerParamScheduler | None = None,
    verify_files: bool = True,
    iteration: int | None = None,
) -> TrainState:
    """Load the latest checkpoint in `root`, or that of `iteration`, whatever layout wrote it. Collective.

    Learning rate, decay and the like stay those of the running configuration; a checkpoint brings weights,
    moments and the step.

    Args:
        optimizer: None: weights only.
        verify_files: compare them with the manifest first.

    Raises:
        UserError: no checkpoint there, a file that differs from the manifest, or tensors that are not exactly
            the model's (names are given).
    """
    folder = checkpoint_folder(root, iteration)
    if verify_files:
        verify_together(folder)
    if optimizer is not None:
        settings = [dict(group) for group in optimizer.param_groups]
    content = content_to_load(models, optimizer)
    raise_together(_check_keys(folder, content, with_optimizer=optimizer is not None))
    loaded = _read_tensors(folder, content)

    for name, model in unwrapped(models):
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
    return read_train_state(root, iteration)


def _check_keys(folder: Path, content: dict[str, Any], with_optimizer: bool) -> str | None:
    """Compare what all ranks ask for with what the checkpoint holds. Collective; returns what is wrong."""
    try:
        stored = read_index(folder).state_dict_metadata
        problem = None
    except UserError as error:
        stored, problem = {}, str(error)
    wanted = {
        tensor.key: tuple(tensor.global_shape)
        for tensor in sharded_tensors(content)
        if not tensor.allow_shape_mismatch
    }
    flexible = {tensor.key for tensor in sharded_tensors(content) if tensor.allow_shape_mismatch}
    nothing: tuple[set[str], str | None] = set(), None
    gathered = [nothing] * torch.distributed.get_world_size()
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


def _read_tensors(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Megatron's load, with what can be wrong with the files said in one line. Every rank sees the error."""
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(content, str(folder))
        return loaded
    except pickle.UnpicklingError as error:
        problem = f"{folder / 'common.pt'}: damaged, or it holds more than plain values; not loaded"
        raise AgreedError(problem) from error
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = str(cause).partition("\n")[0]
        raise AgreedError(f"{folder}: a file of tensors is damaged (rank {rank}: {reason})") from error


def _some(keys: Iterable[str], limit: int = 4) -> str:
    names = sorted(keys)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
