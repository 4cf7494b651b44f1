"""Saving: what this rank holds becomes a file, and rank 0 makes the files a checkpoint.

Two steps, so that the second can run in the background: `take_snapshot` says what there is to write, and
`write_snapshot` writes it. Only the second communicates, over whatever process group it is given.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_eagle.checkpoint.content import TensorBox, content_to_save, optimizer_step, set_optimizer_step
from megatron_eagle.checkpoint.files import Written, write_pieces
from megatron_eagle.checkpoint.folder import (
    TrainState,
    describe_latest,
    discard_folder,
    iteration_folder,
    partial_folder,
    publish_folder,
    retain_folders,
    start_folder,
)
from megatron_eagle.checkpoint.index import write_checkpoint_index
from megatron_eagle.checkpoint.manifest import write_manifest
from megatron_eagle.config import save_yaml, to_dict
from megatron_eagle.errors import UserError
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.runtime.agreement import gather_to_first, raise_together


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of a checkpoint. The values of `pieces` are those of the running training until they
    are copied; everything else is a copy."""

    pieces: list[TensorBox]
    common: dict[str, Any]
    run: dict[str, Any]
    state: TrainState


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
    """Save this iteration and make it the latest. Collective over all ranks.

    Args:
        models: this rank's chunks, wrapped or not.
        run_config: any configuration with a `model` section (dataclass or mapping).
        model_config: all that a tool without a run gives instead.
        keep_last: afterwards, of the checkpoints up to this one, all but so many are deleted; None: none is.

    Returns:
        The checkpoint's folder.

    Raises:
        AgreedError: where `root` cannot be written (a full disk: what was written is removed, the latest
            checkpoint stays) or its latest checkpoint is this very iteration (it is never overwritten in
            place).
    """
    run = run_config if run_config is not None else {"model": to_dict(model_config)}
    state = TrainState(iteration, consumed_packs, list(recent_losses))
    snapshot = take_snapshot(models, optimizer, scheduler, run, state)
    return write_snapshot(Path(root), snapshot, keep_last)


def take_snapshot(
    models: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler | None,
    run_config: Any,
    state: TrainState,
) -> Snapshot:
    """This rank's share, not yet copied."""
    pieces, common = content_to_save(models, optimizer, scheduler)
    return Snapshot(pieces, common, to_dict(run_config), replace(state, recent_losses=[*state.recent_losses]))


def write_snapshot(
    root: Path,
    snapshot: Snapshot,
    keep_last: int | None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Path:
    """Write all ranks' snapshots as the latest checkpoint. Collective over `group`.

    Raises:
        AgreedError: the checkpoint is there already, or any rank cannot write its part.
    """
    rank, iteration = torch.distributed.get_rank(), snapshot.state.iteration
    raise_together(_start(root, iteration) if rank == 0 else None, group)
    shares = gather_to_first(_write_share(partial_folder(root, iteration), snapshot, rank), group)
    raise_together(_finish(root, snapshot, shares) if rank == 0 else None, group)
    if rank == 0 and keep_last is not None:
        retain_folders(root, iteration, keep_last)
    return iteration_folder(root, iteration)


@dataclass(frozen=True)
class _Share:
    """What rank 0 needs to know of a rank's part."""

    file: Written | None  # None: the rank had nothing to write
    step: float
    problem: str | None = None


def _start(root: Path, iteration: int) -> str | None:
    try:
        start_folder(root, iteration)
    except UserError as error:
        return str(error)
    return None


def _write_share(partial: Path, snapshot: Snapshot, rank: int) -> _Share:
    file, problem = None, None
    try:
        if snapshot.pieces:
            file = write_pieces(partial / f"__{rank}_0.distcp", snapshot.pieces)
    except Exception as error:  # whatever it is, the other ranks wait to hear of it
        problem = f"rank {rank}: {_reason(error)}"
    return _Share(file, optimizer_step(snapshot.common), problem)


def _finish(root: Path, snapshot: Snapshot, shares: list[_Share]) -> str | None:
    """Add what is common to all ranks and publish. Returns what went wrong; nothing of it stays then."""
    iteration = snapshot.state.iteration
    problem = next((share.problem for share in shares if share.problem), None)
    if problem is None:
        try:
            set_optimizer_step(snapshot.common, max(share.step for share in shares))
            files = [share.file for share in shares if share.file]
            complete_folder(
                partial_folder(root, iteration), snapshot.common, snapshot.run, snapshot.state, files
            )
            publish_folder(root, iteration)
        except Exception as error:  # as in `_write_share`
            problem = _reason(error)
    if problem is None:
        return None
    discard_folder(root, iteration)
    return f"{root}: iteration {iteration} could not be saved: {problem}; {describe_latest(root)}"


def complete_folder(
    folder: Path, common: dict[str, Any], run: dict[str, Any], state: TrainState, files: list[Written]
) -> None:
    """Write what a checkpoint holds beside the tensors, which are in `files`.

    Raises:
        OSError: a file cannot be written.
    """
    torch.save(common, folder / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    write_checkpoint_index(folder, (entry for file in files for entry in file.entries))
    save_yaml(run, folder / "run.yaml")
    (folder / "state.json").write_text(json.dumps(to_dict(state)))
    write_manifest(folder, {file.name: {"bytes": file.size, "sha256": file.sha256} for file in files})


def _reason(error: BaseException) -> str:
    """What the system says, in one line."""
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]
