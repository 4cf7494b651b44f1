"""A checkpoint on disk: its folder's name, its small files, and how a folder becomes the latest checkpoint.

A folder is filled under a hidden name and renamed when every file is on disk; the tracker follows. A process
killed at any point, or a disk that is full, leaves the last checkpoint loadable.
"""

import contextlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from megatron_eagle.config import from_dict, load_yaml
from megatron_eagle.data.loading.identity import DataIdentity
from megatron_eagle.errors import UserError
from megatron_eagle.files import nearest_folder, sync, write_whole
from megatron_eagle.model.flops import PARTS
from megatron_eagle.model.lora import LoraConfig
from megatron_eagle.model.presets import EagleConfig

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class BatchRead:
    """A global batch of a store that is followed: its packs, and what they were read from."""

    first_pack: int
    packs: int
    data: DataIdentity


@dataclass
class TrainState:
    """Where a run stands: finished iterations, packs read (the whole state of the data loader)."""

    iteration: int = 0
    consumed_packs: int = 0
    recent_losses: list[float] = field(default_factory=list)  # what a loss spike is measured against
    started_from: int | None = None  # iteration of checkpoint.load with whose weights the run began
    read: BatchRead | None = None  # the last batch, where the data are followed


def has_checkpoint(root: str | Path) -> bool:
    """Whether a checkpoint was ever completed in `root`."""
    return (Path(root) / TRACKER).is_file()


def checkpoint_folder(root: str | Path, iteration: int | None = None) -> Path:
    """The folder of the latest complete checkpoint in `root`, or of this iteration's.

    Raises:
        UserError: there is none.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; expected a checkpoint (a folder with {TRACKER})")
    if not has_checkpoint(root):
        inside = root.name.startswith("iter_") and has_checkpoint(root.parent)
        advice = f"; name its parent {root.parent}" if inside else ""
        raise UserError(f"{root}: not a checkpoint, it has no {TRACKER}{advice}")
    if iteration is None:
        text = (root / TRACKER).read_text().strip()
        if not text.isdecimal():
            raise UserError(f"{root / TRACKER}: expected an iteration number, found {text[:40]!r}")
        iteration = int(text)
    folder = iteration_folder(root, iteration)
    if not folder.is_dir():
        there = ", ".join(map(str, saved_iterations(root))) or "none"
        raise UserError(f"{root}: no checkpoint of iteration {iteration}; it has those of {there}")
    for name in ("metadata.json", ".metadata", "common.pt", "run.yaml", "state.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: incomplete checkpoint, {name} is missing; copy it again in full")
    return folder


def iteration_folder(root: Path, iteration: int) -> Path:
    """Where the checkpoint of this iteration lies, or will."""
    return root / f"iter_{iteration:07d}"


def partial_folder(root: Path, iteration: int) -> Path:
    """Where it is filled until it is complete."""
    return root / f".{iteration_folder(root, iteration).name}.saving"


def saved_iterations(root: str | Path) -> list[int]:
    """Iterations whose checkpoint `root` still has, ascending."""
    names = (path.name.removeprefix("iter_") for path in Path(root).glob("iter_*"))
    return sorted(int(name) for name in names if name.isdecimal())


def read_model_config(root: str | Path) -> EagleConfig:
    """The model configuration that the latest checkpoint in `root` was saved with."""
    run_file = checkpoint_folder(root) / "run.yaml"
    run = load_yaml(run_file)
    if run.get("model") is None:
        raise UserError(f"{run_file}: no model section; the checkpoint was not written by this project")
    model = from_dict(EagleConfig, run["model"], f"{run_file}: model")
    data = run.get("data")
    trained = data.get("length") if isinstance(data, dict) else None
    if isinstance(trained, int):  # version 0.1.0 did not raise it to the length of the packs
        model.text.max_position_embeddings = max(model.text.max_position_embeddings, trained)
    return model


def read_lora_config(root: str | Path) -> LoraConfig | None:
    """The adapters on the latest checkpoint's language model, which stay apart from its weights."""
    run_file = checkpoint_folder(root) / "run.yaml"
    section = load_yaml(run_file).get("lora")
    return None if section is None else from_dict(LoraConfig, section, f"{run_file}: lora")


def read_trainable(root: str | Path) -> tuple[tuple[str, ...], bool]:
    """The parts that the run of the latest checkpoint in `root` trains (`optimizer.trainable`), and whether
    it leaves routers out (`optimizer.freeze_router`)."""
    section = load_yaml(checkpoint_folder(root) / "run.yaml").get("optimizer") or {}
    return tuple(section.get("trainable", PARTS)), bool(section.get("freeze_router", False))


def read_train_state(root: str | Path, iteration: int | None = None) -> TrainState:
    """Iteration and data position of the latest checkpoint in `root`, or of this iteration's."""
    file = checkpoint_folder(root, iteration) / "state.json"
    try:
        return from_dict(TrainState, json.loads(file.read_text()), str(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from error


def start_folder(root: Path, iteration: int) -> None:
    """Make the empty folder to fill; what killed saves left is deleted. On rank 0.

    Raises:
        UserError: `root` cannot be written, or its latest checkpoint is this very iteration (a checkpoint is
            never overwritten in place).
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        if has_checkpoint(root) and checkpoint_folder(root) == iteration_folder(root, iteration):
            raise UserError(f"{root}: already holds iteration {iteration}; choose another folder")
        for left in root.glob(".iter_*.saving"):
            shutil.rmtree(left)
        partial_folder(root, iteration).mkdir()
    except OSError as error:
        raise UserError(f"{root}: cannot write a checkpoint here: {error}") from error


def publish_folder(root: Path, iteration: int) -> None:
    """Make the folder, which is complete, the latest checkpoint of `root`; on rank 0.

    Raises:
        OSError: the folder or its name cannot be written.
    """
    partial, target = partial_folder(root, iteration), iteration_folder(root, iteration)
    for file in (*partial.iterdir(), partial):
        sync(file)
    shutil.rmtree(target, ignore_errors=True)  # saved before, and then abandoned for an earlier iteration
    partial.rename(target)
    sync(root)
    write_whole(root / TRACKER, f"{iteration}\n")
    sync(root)


def discard_folder(root: Path, iteration: int) -> None:
    """Delete what was filled; on rank 0. Gives a full disk its space back."""
    shutil.rmtree(partial_folder(root, iteration), ignore_errors=True)


def retain_folders(root: Path, iteration: int, keep_last: int) -> None:
    """Delete all but `keep_last` of the checkpoints up to `iteration`; on rank 0.

    A folder loses its name before its files, so that a half-deleted one is never taken for a checkpoint. What
    cannot be deleted stays: a run does not end for that.
    """
    saved = sorted(root.glob("iter_*"), key=lambda folder: folder.name)
    upto = [folder for folder in saved if folder.name <= iteration_folder(root, iteration).name]
    for folder in upto[:-keep_last]:
        with contextlib.suppress(OSError):
            folder.rename(root / f".{folder.name}.deleting")
    for folder in root.glob(".iter_*.deleting"):  # also what a killed process left
        shutil.rmtree(folder, ignore_errors=True)


def check_space(root: Path, size: int, keep_last: int | None, saves: int, *, free: int | None = None) -> None:
    """Look whether the checkpoints of a run will fit: those that it keeps, and the one that is written.

    Args:
        size: of one, in bytes.
        keep_last: how many are kept; None: room for one and the next is asked for.
        saves: how many the run will make, which may be fewer.
        free: bytes, as another machine has found them; None: looked for here.
    Raises:
        UserError: they will not.
    """
    held = sum(file.stat().st_size for file in root.glob("iter_*/**/*") if file.is_file())
    count = min((keep_last or 1) + 1, len(saved_iterations(root)) + saves)
    if free is None:
        free = shutil.disk_usage(nearest_folder(root)).free
    if count * size - held <= free:
        return
    raise UserError(
        f"{root}: {free / 1e9:.3f} GB are free, too few for the run's checkpoints: {count} of "
        f"{size / 1e9:.3f} GB, of which {held / 1e9:.3f} GB are there: make room, lower checkpoint.keep_last "
        "or name another checkpoint.path (checkpoint.check_space=false starts all the same)"
    )


def describe_latest(root: Path) -> str:
    """What can still be loaded, for messages."""
    if not has_checkpoint(root):
        return "there is no earlier checkpoint"
    return f"iteration {read_train_state(root).iteration} stays the latest checkpoint"
