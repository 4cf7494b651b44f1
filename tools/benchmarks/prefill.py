"""Memory of a long prompt's pass, read at once and in pieces (`megatron_eagle.inference.prefill`).

A small model in fp32, 448-pixel tiles of 256 tokens; the peak is what the pass holds beyond weights and
pixels, the cache that it returns included. PyTorch's attention takes a piece that follows others with a mask
of piece x prompt, which long pieces pay for; beside wider layers, as real ones are, it weighs less.
"""

from typing import Any

import torch
from benchmarks.measuring import peak_bytes
from benchmarks.report import Report, progress

from megatron_eagle.hf_model.configuration_eagle2_5_vl import Eagle2_5_VLConfig
from megatron_eagle.hf_model.modeling_eagle2_5_vl import Eagle2_5_VLForConditionalGeneration
from megatron_eagle.inference.prefill import prefill

CHUNKS = (8192, 2048, 512)
IMAGE_TOKEN = 7


def run(large: bool = False) -> Report:
    """Prompts of 64 tiles; `large`: also of 128."""
    torch.manual_seed(0)
    model: Any = Eagle2_5_VLForConditionalGeneration(_config())
    model.eval()
    rows = []
    for tiles in (64, 128) if large else (64,):
        pixels = torch.rand(tiles, 3, 448, 448) * 2 - 1
        ids = torch.full((1, tiles * model.config.tokens_per_tile + 64), 3)
        ids[0, 32:-32] = IMAGE_TOKEN
        found = []
        for chunk in (None, *CHUNKS):
            progress(f"{ids.shape[1]} tokens, {chunk or 'at once'}")
            logits = []
            peak = peak_bytes(lambda: logits.append(_last_logits(model, ids, pixels, chunk)))  # noqa: B023
            found.append((chunk, peak, logits[0]))
        (_, whole, expected), *_ = found
        cache = 4 * ids.shape[1] * 2 * 2 * 2 * 64  # layers, keys and values, groups, width of a head
        rows += [
            {
                "tokens": ids.shape[1],
                "read": "at once" if chunk is None else f"{chunk} at a time",
                "peak MB": peak / 1e6,
                "of it cache MB": cache / 1e6,
                "x at once": peak / whole,
                "largest difference of logits": (logits - expected).abs().max().item(),
            }
            for chunk, peak, logits in found
        ]
    title = "fp32 on a CPU, 2 + 2 layers of 128 and 256 features; peak of the pass beyond weights and pixels"
    return Report(title, rows, "--large" if large else "")


@torch.no_grad()
def _last_logits(model: Any, ids: torch.Tensor, pixels: torch.Tensor, chunk: int | None) -> torch.Tensor:
    """Logits of the last position, [vocabulary]; at once as transformers' `generate` does it."""
    if chunk is None:
        whole: torch.Tensor = model(pixels, ids, use_cache=True, logits_to_keep=1).logits[0, -1]
        return whole
    cache, embeddings = prefill(model, ids, pixels, chunk)
    last: torch.Tensor = model(inputs_embeds=embeddings[:, -1:], past_key_values=cache).logits[0, -1]
    return last


def _config() -> Eagle2_5_VLConfig:
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 256, "intermediate_size": 1280, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Eagle2_5_VLConfig(
        vision_config={**vision, "image_size": 448, "patch_size": 14},
        text_config={
            **text,
            "num_key_value_heads": 2,
            "vocab_size": 1024,
            "max_position_embeddings": 131072,
        },
        image_token_index=IMAGE_TOKEN,
    )
