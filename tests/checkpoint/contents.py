"""What a checkpoint holds, put together from its files without Megatron, and what Megatron says it should."""

import io
from pathlib import Path

import torch

from megatron_eagle.checkpoint import CONTENT_METADATA, checkpoint_folder, read_index
from megatron_eagle.checkpoint.content import model_content, optimizer_parts, sharded_tensors


def read_whole(root: str | Path) -> dict[str, torch.Tensor]:
    """Key -> whole tensor of the latest checkpoint in `root`: weights, main parameters and moments."""
    folder = checkpoint_folder(root)
    index = read_index(folder)
    tensors = {}
    for key, described in index.state_dict_metadata.items():
        tensors[key] = torch.full(described.size, float("nan"), dtype=described.properties.dtype)
    for place, info in index.storage_data.items():
        with open(folder / info.relative_path, "rb") as file:
            file.seek(info.offset)
            part = torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
        box = tuple(slice(a, a + n) for a, n in zip(place.offset, part.shape, strict=True))
        tensors[place.fqn][box] = part
    return tensors


def read_step(root: str | Path) -> list[float]:
    """The optimizer's step, as every parameter group has it."""
    common = torch.load(checkpoint_folder(root) / "common.pt", weights_only=True)
    parts = optimizer_parts(common["optimizer"])
    return [group["step"] for part in parts for group in part["optimizer"]["param_groups"]]


def different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Keys that only one has, or whose bits differ."""
    both = one.keys() & other.keys()
    return sorted(one.keys() ^ other.keys()) + sorted(k for k in both if not torch.equal(one[k], other[k]))


def different_from_megatron(root: str | Path, models: list, optimizer) -> tuple[int, list[str]]:
    """On each rank of the job that saved `root`: how many tensors Megatron's own way to save this format,
    which gathers the optimizer's state, describes here; and which of them the checkpoint does not hold."""
    content = model_content(models)
    state = optimizer.sharded_state_dict(content, is_loading=False, metadata=dict(CONTENT_METADATA))
    stored = read_whole(root)
    described = list(sharded_tensors([content, [part["param_state"] for part in optimizer_parts(state)]]))
    wrong = []
    for tensor in described:
        box = stored[tensor.key][tensor.global_slice()]
        if not torch.equal(box, tensor.data.detach().reshape(box.shape)):
            wrong.append(tensor.key)
    return len(described), wrong
