"""What a run reads and writes, by its configuration: rank 0 works it out, all nodes look at it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from megatron_eagle.checkpoint import (
    check_space,
    checkpoint_bytes,
    checkpoint_folder,
    has_checkpoint,
    read_train_state,
)
from megatron_eagle.data.loading.loader import DataConfig
from megatron_eagle.data.media.remote.addresses import is_remote
from megatron_eagle.data.media.source import is_inline
from megatron_eagle.data.store.manifest import read_manifest
from megatron_eagle.data.store.reader import ImagePlan, VideoPlan
from megatron_eagle.data.store.shards import open_any_rows
from megatron_eagle.errors import UserError
from megatron_eagle.model.shapes import PackShapes, StageShapes
from megatron_eagle.planning.memory_shapes import count_parameters
from megatron_eagle.runtime.parallel import ParallelConfig
from megatron_eagle.training.run_config import RunConfig
from megatron_eagle.training.saves import saves_left
from megatron_eagle.training.setup import logs_folder

# Of the media of a store, spread over it: whether its file systems are there, not each file.
_MEDIA, _ROWS = 16, 64


@dataclass(frozen=True)
class Places:
    """What every node looks at.

    Attributes:
        reads: file -> its bytes here.
        media: medium, as `data.media.source` names it -> its bytes when it was probed.
        writes: folders.
    """

    reads: dict[str, int] = field(default_factory=dict)
    media: dict[str, int] = field(default_factory=dict)
    writes: list[str] = field(default_factory=list)


def places_of(config_file: str, configs: Sequence[RunConfig], also_written: Sequence[str] = ()) -> Places:
    """Of the runs (or stages) of a file.

    Args:
        also_written: other folders that all nodes write, as for their processes' logs.
    Raises:
        UserError: a store cannot be read here either.
    """
    reads, media = [Path(config_file)], dict[str, int]()
    writes = list(also_written)
    for config in configs:
        stores = [config.data.folder]
        if config.evaluation is not None:
            stores.append(Path(config.evaluation.data))
        for store in stores:
            reads += _files(store, config.data)
            media |= dict(_media(store, config.data.length))
        for root in (config.checkpoint.load, config.checkpoint.path):
            if root is not None and has_checkpoint(root):
                reads += [file for file in checkpoint_folder(root).iterdir() if file.is_file()]
        writes += [config.checkpoint.path, str(logs_folder(config))]
    sizes = {str(file.absolute()): file.stat().st_size for file in reads}
    return Places(sizes, media, list(dict.fromkeys(str(Path(folder).absolute()) for folder in writes)))


def why_no_space(config: RunConfig, free: int) -> str | None:
    """Whether the run's checkpoints fit where `free` bytes are left, by the rule of its start.

    A rank of a run counts what its model will save; here the model's sizes do.
    """
    checkpoint = config.checkpoint
    root, last = Path(checkpoint.path), config.training.last_iteration
    done = read_train_state(root).iteration if has_checkpoint(root) else 0
    if not (checkpoint.save and checkpoint.check_space) or done >= last:
        return None
    shapes = PackShapes(config.model, ParallelConfig(), config.data.length)
    parameters = count_parameters(shapes, StageShapes.of(shapes, 0), config.lora)
    size = checkpoint_bytes(
        parameters.total * config.training.dtype.itemsize, parameters.trained(config.optimizer.trainable)
    )
    try:
        check_space(
            root, size, checkpoint.keep_last, saves_left(done, last, checkpoint.save_interval), free=free
        )
    except UserError as error:
        return str(error)
    return None


def _files(store: Path, data: DataConfig) -> Iterator[Path]:
    """Those that training reads."""
    yield store / "manifest.json"
    yield from (store / name for name in read_manifest(store).files)
    if data.follow is None:
        yield store / str(data.length) / "packs.arrow"


def _media(store: Path, length: int) -> Iterable[tuple[str, int]]:
    """Some media of a store that are files of these machines."""
    rows = open_any_rows(store, length)
    step = max(1, len(rows) // _ROWS)
    samples = (rows[row] for row in range(0, len(rows), step))
    found = (
        plan for sample in samples for plan in chain[ImagePlan | VideoPlan](sample.images, sample.videos)
    )
    files = (plan for plan in found if not is_remote(plan.path) and not is_inline(plan.path))
    return ((plan.path, plan.file_size) for plan in islice(files, _MEDIA))
