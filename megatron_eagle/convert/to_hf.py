"""Export: a Megatron checkpoint of any layout becomes a Hugging Face folder that runs by itself."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megatron_eagle.checkpoint import checkpoint_folder, read_lora_config, read_model_config
from megatron_eagle.checkpoint.manifest import verify_files
from megatron_eagle.convert.checkpoint_files import CheckpointWeights
from megatron_eagle.convert.export_files import write_config, write_processor
from megatron_eagle.convert.hf_metadata import HfMetadata
from megatron_eagle.convert.lora import adapter_names, merged
from megatron_eagle.convert.mapping import ModelMapping
from megatron_eagle.convert.model_card import FILE as CARD
from megatron_eagle.convert.model_card import CardFacts, rewrite_certificate, write_model_card
from megatron_eagle.convert.shards import DTYPES, plan_shards, tensor_bytes, write_shards
from megatron_eagle.convert.whole_model import trained_type
from megatron_eagle.errors import UserError
from megatron_eagle.files import write_whole
from megatron_eagle.hf_model.vllm_plugin.certificate import CERTIFICATE
from megatron_eagle.model.lora import LoraConfig

# Names an exported folder's own files, so that a later export may replace them and nothing else.
RECORD = "megatron_eagle_export.json"


def export_hf(
    checkpoint: str | Path,
    hf: str | Path,
    *,
    max_tiles: int | None = None,
    max_frames: int | None = None,
    merge: bool = True,
    verify: bool = True,
    facts: CardFacts | None = None,
) -> list[str]:
    """Write the latest weights in `checkpoint` as a Hugging Face checkpoint into the folder `hf`.

    An imported model keeps its source's names, shards, types and pooling head, bit for bit where training did
    not change them. One tensor at a time is in memory. The folder appears when it is complete. An earlier
    export there is replaced.

    Args:
        max_tiles: tiles per picture for the exported processor; default: the source's, else 12.
        max_frames: of a video, likewise; default: the data's or the source's, else 256.
        merge: add the checkpoint's LoRA adapters, if it has any, to the weights that they adapt. Without it
            the folder is their base (`convert.lora.export_adapter` writes them).
        verify: read the checkpoint twice, first to compare every file with its manifest.
        facts: what its README.md says beside what the checkpoint knows. One that has been changed by hand
            since an earlier export stays.

    Returns:
        Names of the files written.

    Raises:
        UserError: no checkpoint, a damaged one, a tokenizer of another model, or `hf` holds something else
            than an export.
    """
    checkpoint, target = Path(checkpoint), Path(hf)
    config = read_model_config(checkpoint)
    _check_target(target)
    if verify:
        verify_files(checkpoint_folder(checkpoint))
    metadata = HfMetadata(checkpoint)
    extra = metadata.tensors()
    plan = ModelMapping(config, has_head=bool(extra))
    shapes = {name: tuple(tensor.shape) for name, tensor in extra.items()}
    plan.check_hf({**plan.hf_shapes, **shapes}, str(metadata.folder))

    lora = read_lora_config(checkpoint)
    weights = CheckpointWeights(checkpoint)
    weights.check(plan, () if lora is None else adapter_names(config, lora))
    dtypes = _dtypes(plan, metadata, checkpoint)
    weight_map = metadata.weight_map or plan_shards(
        {name: tensor_bytes(shape, dtypes[name]) for name, shape in plan.hf_shapes.items()}
    )
    if weight_map.keys() != plan.hf_shapes.keys():
        odd = sorted(weight_map.keys() ^ plan.hf_shapes.keys())
        raise UserError(f"{metadata.folder}: its shard index is of another model, as {', '.join(odd[:4])}")

    partial = target.parent / f".{target.name}.exporting"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        partial.mkdir(parents=True)
        write_config(partial, config, metadata, dtypes, has_head=bool(extra))
        write_processor(partial, config, metadata, max_tiles, max_frames)
        tensors = _tensors(weights, plan, dtypes, extra, lora if merge else None)
        kinds = {name: (dtypes[name], shape) for name, shape in plan.hf_shapes.items()}
        write_shards(partial, tensors, weight_map, kinds)
        name = target.resolve().name
        write_model_card(partial, name, checkpoint, config, plan.hf_shapes.values(), facts or CardFacts())
        files = _files(partial)
        record = {"iteration": int(weights.folder.name[5:]), "files": files, "card": _digest(partial)}
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        _publish(partial, target)
    except OSError as error:
        raise UserError(f"{target}: cannot write here: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return files


def _tensors(
    weights: CheckpointWeights,
    plan: ModelMapping,
    dtypes: dict[str, str],
    extra: dict[str, Tensor],
    lora: LoraConfig | None,
) -> Iterator[tuple[str, Tensor]]:
    tensors = plan.to_hf(weights.read)
    if lora is not None:
        tensors = merged(tensors, weights, plan.config, lora)
    for name, tensor in itertools.chain(extra.items(), tensors):
        yield name, tensor.to(DTYPES[dtypes[name]])


def _dtypes(plan: ModelMapping, metadata: HfMetadata, checkpoint: Path) -> dict[str, str]:
    """Type of every exported tensor: the source's, or for a model from scratch the one it was trained in."""
    return {**dict.fromkeys(plan.hf_shapes, trained_type(checkpoint)), **metadata.dtypes}


def _check_target(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()) and not (target / RECORD).is_file():
        raise UserError(f"{target}: exists and is no earlier export; choose a new or empty folder")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; name a folder for the export")


def note_certificate(folder: Path) -> None:
    """Let the card of an export say what its certificate says; a card that was as we wrote it stays one."""
    record = json.loads((folder / RECORD).read_text()) if (folder / RECORD).is_file() else {}
    ours = (folder / CARD).is_file() and record.get("card") == _digest(folder)
    rewrite_certificate(folder)
    if ours:
        write_whole(folder / RECORD, json.dumps(record | {"card": _digest(folder)}, indent=1) + "\n")


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / CARD).read_bytes()).hexdigest()


def _publish(partial: Path, target: Path) -> None:
    """Put the finished files in place; files of an earlier export go, others in the folder stay."""
    target.mkdir(exist_ok=True)
    earlier = target / RECORD
    record = json.loads(earlier.read_text()) if earlier.is_file() else {}
    old = {name for name in record.get("files", []) if ".." not in Path(name).parts}
    if (target / CARD).is_file() and record.get("card") != _digest(target):  # somebody has written there
        (partial / CARD).unlink()
        old.discard(CARD)
    for name in (RECORD, CERTIFICATE, *old):  # a certificate is of the files that it was made with
        (target / Path(name).relative_to(Path(name).anchor)).unlink(missing_ok=True)
    for name in sorted(_files(partial), key=lambda name: name == RECORD):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, target / name)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
