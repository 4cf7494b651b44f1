"""Memory of language layers under each recompute policy: forward and backward of one pack on a CPU, in fp32.

Peak memory is the largest running sum of torch.profiler's memory events beyond what was there before the
step: weights, gradient buffers, and the slab of host memory that a first step has made. `formula` is what
`planning/memory_model.py` counts from shapes. The model is Eagle 2.5 with small language layers, the pack one
tile and short documents, so that layers and not the reference attention's score matrices fill the memory.
"""

from typing import Any

import torch
from benchmarks.measuring import peak_bytes
from benchmarks.report import Report, progress

from megatron_eagle.model.eagle import build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.inputs import make_input
from megatron_eagle.model.language import Targets
from megatron_eagle.model.presets import EagleConfig, VisionConfig
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.model.text import TextConfig
from megatron_eagle.planning.memory_model import memory_moments
from megatron_eagle.planning.memory_shapes import Workload
from megatron_eagle.runtime.device import detect_device, process_group
from megatron_eagle.runtime.parallel import Mesh, ParallelConfig, model_parallel
from megatron_eagle.training.loss import megatron_loss
from megatron_eagle.training.optimizer import wrap_models

DOCUMENT = 256  # tokens
POLICIES = {
    "none": RecomputeConfig(),
    "none, swiglu": RecomputeConfig(swiglu=True),
    "full": RecomputeConfig("full"),
    "offload": RecomputeConfig("offload"),
    "offload, none stays": RecomputeConfig("offload", offload_keep_last=0),
    "offload, swiglu": RecomputeConfig("offload", swiglu=True),
}


def model(layers: int) -> EagleConfig:
    """Language layers of 256 features, one encoder layer."""
    vision = VisionConfig(
        image_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    text = TextConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=504,
    )
    return EagleConfig(vision=vision, text=text, image_token_index=7).validate()


def pack(eagle: EagleConfig, tokens: int) -> dict[str, Any]:
    """One tile, then text, in documents of `DOCUMENT` tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 504, (tokens,), generator=generator)
    ids[: eagle.tokens_per_tile] = eagle.image_token_index
    size = eagle.vision.image_size
    return {
        "input_ids": ids,
        "position_ids": torch.arange(tokens) % DOCUMENT,
        "document_bounds": list(range(0, tokens + 1, DOCUMENT)),
        "targets": Targets(ids.roll(-1), torch.full((tokens,), 1 / tokens), torch.zeros_like(ids)),
        "pixel_values": torch.rand(1, 3, size, size, generator=generator),
    }


def measure(mesh: Mesh, layers: int, tokens: int, policy: str) -> dict[str, Any]:
    """Peak of a step and its formula, as a row; call inside `model_parallel`."""
    eagle, recompute, cpu = model(layers), POLICIES[policy], torch.device("cpu")
    models = build_model(eagle, mesh, cpu, recompute=recompute)
    initialize_parameters(models, seed=1)
    [wrapped] = wrap_models(models)
    inputs = make_input(eagle, mesh, cpu, **pack(eagle, tokens))

    def step() -> float:
        wrapped.zero_grad_buffer()
        loss = megatron_loss(wrapped(inputs), inputs.targets)[0]
        loss.backward()
        return loss.item()

    loss = step()
    peak = peak_bytes(step)
    workload = Workload(tokens, 1, 1, "fp32", DOCUMENT, recompute, device="cpu")
    moments = memory_moments(eagle, mesh.config, 1, workload, stage=0)
    formula = max(m.total - m.states for m in moments if m.moment == "loss" or m.moment.endswith("backward"))
    return {
        "layers": layers,
        "tokens": tokens,
        "recompute": policy,
        "peak MB": peak / 1e6,
        "formula MB": formula / 1e6,
        "loss": loss,
    }


def run(large: bool = False) -> Report:
    """Growth in layers; `large`: also in tokens."""
    torch.set_num_threads(1)
    sizes = [(4, 1024), (16, 1024)] + [(16, 4096)] * large
    here, rows = detect_device(), []
    with here.context(), process_group(here), model_parallel(ParallelConfig()) as mesh:
        for layers, tokens in sizes:
            progress(f"{layers} layers, {tokens:,} tokens")
            found = [measure(mesh, layers, tokens, policy) for policy in POLICIES]
            rows += [row | {"x none": row["peak MB"] / found[0]["peak MB"]} for row in found]
    title = "fp32, one CPU thread, 256 features; peak of forward and backward beyond states and the host slab"
    return Report(title, rows, "--large" * large)
