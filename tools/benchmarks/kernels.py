"""Every kernel on a GPU beside eager torch, torch.compile, Liger and Transformer Engine, at Eagle's shapes.

Norms, SwiGLU and RoPE are bound by memory: `of bound` is their bandwidth over that of a copy measured in the
same run. That of the fused loss is the time of its three matrix products over its own; that of activation
offload is the share of its copies that hide behind computation, against the same layers whose tensors stay.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from benchmarks import linear_ce
from benchmarks.measuring import peak_bytes, seconds
from benchmarks.report import Report, progress
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from eagle_kernels.layer_norm import layer_norm
from eagle_kernels.rms_norm import rms_norm
from eagle_kernels.rope import inverse_frequencies, rope, rotary_table
from eagle_kernels.swiglu import swiglu
from megatron_eagle.errors import UserError
from megatron_eagle.model.eagle import ModelInput, build_model
from megatron_eagle.model.initialization import initialize_parameters
from megatron_eagle.model.inputs import make_input
from megatron_eagle.model.language import Targets
from megatron_eagle.model.presets import EagleConfig, preset
from megatron_eagle.model.specs import RecomputeConfig
from megatron_eagle.runtime.device import detect_device, process_group
from megatron_eagle.runtime.parallel import Mesh, ParallelConfig, model_parallel
from megatron_eagle.training.loss import megatron_loss
from megatron_eagle.training.optimizer import wrap_models

HIDDEN, FFN, VISION, HEADS, HEAD = 3584, 18944, 1152, 28, 128
EPS, REPEATS = 1e-6, 20
OFFLOAD_TOKENS, OFFLOAD_LAYERS = 32768, 8


@dataclass(frozen=True)
class Operation:
    """A kernel on its inputs, its forms by name, and the passes over its output's elements that it makes."""

    name: str
    inputs: tuple[Tensor, ...]
    forms: dict[str, Callable[..., Tensor]]
    passes: tuple[int, int]  # forward, backward


def operations(tokens: int, device: str, dtype: torch.dtype, widths: tuple[int, ...]) -> Iterator[Operation]:
    """On `tokens` rows. widths: of the hidden states, of the feed-forward, of the encoder, query heads."""
    hidden, ffn, encoder, heads = widths

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    liger, engine = find_spec("liger_kernel"), find_spec("transformer_engine")
    own = "triton" if device == "cuda" else "eager"

    def forms(function: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
        eager = lambda *x: function(*x, "eager")  # noqa: E731
        found = {"ours": lambda *x: function(*x, own), "eager": eager}
        return found | ({"torch.compile": torch.compile(eager)} if device == "cuda" else {})

    norm = forms(lambda x, w, implementation: rms_norm(x, w, EPS, implementation))
    if device == "cuda" and liger:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        norm["Liger"] = lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)
    if device == "cuda" and engine:
        import transformer_engine.pytorch as te

        module = te.RMSNorm(hidden, eps=EPS, params_dtype=dtype)
        norm["Transformer Engine"] = lambda x, _: module(x)
    yield Operation("rms_norm", (tensor(tokens, hidden), tensor(hidden)), norm, (2, 3))

    norm = forms(lambda x, w, b, implementation: layer_norm(x, w, b, EPS, implementation))
    if device == "cuda" and liger:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        norm["Liger"] = lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS)
    yield Operation("layer_norm", (tensor(tokens, encoder), tensor(encoder), tensor(encoder)), norm, (2, 3))

    activation = forms(lambda x, implementation: swiglu(x, implementation))
    if device == "cuda" and liger:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        activation["Liger"] = lambda x: LigerSiLUMulFunction.apply(*x.chunk(2, dim=-1))
    yield Operation("swiglu", (tensor(tokens, 2 * ffn),), activation, (3, 5))

    frequencies = inverse_frequencies(HEAD, 1e6).to(device)
    table = rotary_table(torch.arange(tokens, device=device), frequencies, dtype)
    turn = forms(lambda x, implementation: rope(x, *table, implementation))
    yield Operation("rope", (tensor(tokens, heads, HEAD),), turn, (2, 2))


def elementwise(
    tokens: int, device: str, dtype: torch.dtype, widths: tuple[int, ...], copy: float
) -> list[dict[str, Any]]:
    """Rows of every operation and form; `copy`: bytes that a copy reads and writes in a second."""
    rows = []
    for operation in operations(tokens, device, dtype, widths):
        for form, function in operation.forms.items():
            y = function(*operation.inputs)
            grad = torch.randn_like(y)

            inputs = operation.inputs
            backward = partial(torch.autograd.grad, y, inputs, grad, retain_graph=True, allow_unused=True)
            peak = peak_bytes(partial(_both, function, inputs, grad), device) / 1e6
            steps: list[Callable[[], object]] = [partial(_forward, function, inputs), backward]
            for way, step, passes in zip(("forward", "backward"), steps, operation.passes, strict=True):
                taken = seconds(step, device, REPEATS)
                speed = passes * y.nbytes / taken
                rows.append(
                    {
                        "kernel": f"{operation.name} {way}",
                        "tokens": tokens,
                        "form": form,
                        "ms": 1e3 * taken,
                        "GB/s": speed / 1e9,
                        "peak MB": peak,
                        "of bound": speed / copy,
                    }
                )
    return rows


def _forward(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    with torch.no_grad():
        function(*inputs)


def _both(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> None:
    torch.autograd.grad(function(*inputs), inputs, grad, allow_unused=True)


def copy_bandwidth(device: str, elements: int) -> float:
    """Bytes read and written a second by a copy of `elements` in bf16."""
    source = torch.zeros(elements, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, REPEATS)


def loss_rows() -> list[dict[str, Any]]:
    """The fused loss beside its peers, with all and with 15 % of the tokens supervised."""
    measured = linear_ce.run(device="cuda").rows
    return [
        {
            "kernel": f"linear_cross_entropy, {row['supervised']:,} supervised",
            "tokens": row["tokens"],
            "form": row["loss"],
            "ms": row["seconds"] if isinstance(row["seconds"], str) else 1e3 * row["seconds"],
            "GB/s": "-",
            "peak MB": row["peak MB"],
            "of bound": "-" if isinstance(row["x products"], str) else 1 / row["x products"],
        }
        for row in measured
    ]


def _pack(eagle: EagleConfig, tokens: int) -> dict[str, Any]:
    ids = torch.full((tokens,), 8)
    ids[: eagle.tokens_per_tile] = eagle.image_token_index
    size = eagle.vision.image_size
    return {
        "input_ids": ids,
        "position_ids": torch.arange(tokens),
        "document_bounds": [0, tokens],
        "targets": Targets(ids, torch.full((tokens,), 1 / tokens), torch.zeros_like(ids)),
        "pixel_values": torch.zeros(1, 3, size, size),
    }


def _step(wrapped: DistributedDataParallel, inputs: ModelInput[Targets]) -> None:
    wrapped.zero_grad_buffer()
    megatron_loss(wrapped(inputs), inputs.targets)[0].backward()


def offload_rows(
    mesh: Mesh, eagle: EagleConfig, tokens: int, dtype: torch.dtype, device: str
) -> list[dict[str, Any]]:
    """A step of some layers with everything away, and with everything on the device: what copies cost."""
    layers = eagle.text.num_hidden_layers
    rows: list[dict[str, Any]] = []
    for form, keep_last in (("all stay", layers), ("all leave", 0)):
        recompute = RecomputeConfig("offload", offload_keep_last=keep_last)
        models = build_model(eagle, mesh, torch.device(device), dtype, recompute)
        initialize_parameters(models, seed=1)
        [wrapped] = wrap_models(models)
        inputs = make_input(eagle, mesh, torch.device(device), **_pack(eagle, tokens))

        step = partial(_step, wrapped, inputs)
        taken = seconds(step, device, 5)
        row = {"kernel": f"activation_offload, {layers} layers", "tokens": tokens, "form": form}
        row |= {"ms": 1e3 * taken, "GB/s": "-", "peak MB": peak_bytes(step, device) / 1e6, "of bound": "-"}
        rows.append(row)
        del models, wrapped, inputs, step
    text = eagle.text
    row_bytes = (text.hidden_size + text.num_attention_heads * text.head_dim) * dtype.itemsize
    away = torch.zeros(tokens, row_bytes + 4 * text.num_attention_heads, dtype=torch.uint8, device=device)
    host = torch.empty(away.shape, dtype=torch.uint8, pin_memory=device == "cuda")
    copies = layers * sum(
        seconds(partial(target.copy_, source, non_blocking=True), device, 5)
        for target, source in ((host, away), (away, host))
    )
    rows[1]["of bound"] = 1 - (rows[1]["ms"] - rows[0]["ms"]) / 1e3 / copies
    rows[1]["GB/s"] = 2 * layers * away.nbytes / copies / 1e9
    return rows


def run() -> Report:
    """All kernels; needs a GPU.

    Raises:
        UserError: there is none.
    """
    if not torch.cuda.is_available():
        raise UserError("kernels: there is no CUDA device here; linear_ce and activation_offload need none")
    here = detect_device()
    copy, rows = copy_bandwidth("cuda", 1 << 30), []
    for tokens in (8192, 32768, 131072):
        progress(f"{tokens:,} tokens")
        rows += elementwise(tokens, "cuda", torch.bfloat16, (HIDDEN, FFN, VISION, HEADS), copy)
    progress("loss")
    rows += loss_rows()
    progress("offload")
    eagle = preset("eagle2.5-8b").complete()
    eagle.text.num_hidden_layers, eagle.vision.num_hidden_layers = OFFLOAD_LAYERS, 1
    eagle.text.vocab_size, eagle.image_token_index = 8192, 7
    with here.context(), process_group(here), model_parallel(ParallelConfig()) as mesh:
        rows += offload_rows(mesh, eagle.validate(), OFFLOAD_TOKENS, torch.bfloat16, "cuda")
    name = torch.cuda.get_device_name()
    return Report(f"{name}, bf16; a copy moves {copy / 1e9:,.0f} GB/s; medians of {REPEATS} runs", rows)
