"""Fresh parameters, the same for every parallel layout: each is drawn from a seed of its global name."""

import zlib

import torch

from megatron_eagle.model.eagle import EagleModel
from megatron_eagle.model.experts import is_expert, whole_model_expert
from megatron_eagle.runtime.parallel import Axis


def global_name(name: str, model: EagleModel) -> str:
    """`name` of a parameter of one pipeline chunk with its layer counted over the whole model.

    The last stage's copy of tied embeddings has the embedding's name.
    """
    if name == "language_model.output_layer.weight" and model.share_embeddings_and_output_weights:
        return "language_model.embedding.word_embeddings.weight"
    prefix = "language_model.decoder.layers."
    if not name.startswith(prefix):
        return name
    index, rest = name.removeprefix(prefix).split(".", 1)
    layer = model.language_model.decoder.layers[int(index)]
    return f"{prefix}{layer.layer_number - 1}.{whole_model_expert(rest, layer)}"


def is_gated(name: str) -> bool:
    """Whether rows are [gate; up]: each half is split over tensor parallel ranks by itself."""
    return name.startswith("language_model.") and "linear_fc1" in name


def divided_over(name: str, model: EagleModel) -> Axis:
    """The ranks that divide a tensor parallel parameter of this name."""
    return model.mesh.expt_tp if is_expert(name) else model.mesh.tp


def tensor_parallel_shard(full: torch.Tensor, name: str, dim: int, size: int, rank: int) -> torch.Tensor:
    """`rank`'s part of a full tensor."""
    parts = full.chunk(2, dim) if is_gated(name) else (full,)
    return torch.cat([part.chunk(size, dim)[rank] for part in parts], dim)


@torch.no_grad()
def initialize_parameters(models: list[EagleModel], seed: int) -> None:
    """Norm weights one, biases zero, everything else normal with `initializer_range`."""
    for model in models:
        for local_name, parameter in model.named_parameters():
            name = global_name(local_name, model)
            if name.endswith(".bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            else:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                shape = list(parameter.shape)
                dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
                if dim is not None:
                    # Asked only here: the connector of an import from parts has no ranks.
                    tp = divided_over(name, model)
                    shape[dim] *= tp.size
                full = torch.empty(shape).normal_(0, model.eagle.initializer_range, generator=generator)
                if dim is not None:
                    full = tensor_parallel_shard(full, name, dim, tp.size, tp.rank)
                parameter.copy_(full)
