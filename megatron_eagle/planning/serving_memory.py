"""What a served prompt takes: weights, keys and values, what the encoder gives, frames on the host.

Keys and values follow from the configuration alone; `tests/serving/test_vllm.py` holds them to the number of
tokens for which vLLM says it has room. What a server computes with in a step, which vLLM measures at its
start, is its own matter and not counted.
"""

from dataclasses import dataclass
from typing import Any

from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.shapes import PackShapes, StageShapes
from megatron_eagle.planning.memory_shapes import FP32, count_parameters
from megatron_eagle.runtime.gpus import Gpu
from megatron_eagle.runtime.parallel import ParallelConfig

BF16 = 2
LABEL = 18  # tokens of a frame's label in Qwen2.5's vocabulary: 17.6 on average in an hour of video
VLLM_SHARE = 0.9  # of a GPU's memory, vLLM's own default


@dataclass(frozen=True)
class ServedPrompt:
    """A prompt of `length` tokens with its answer, and its media.

    Attributes:
        tiles: all of them, a video frame is one.
        frames: of its videos, which stand on the host at `width` x `height` pixels until they are resized.
        kv_bytes: of an element of keys and values: 2 in bf16, 1 in fp8.
    """

    length: int
    tiles: int
    frames: int
    width: int
    height: int
    kv_bytes: int = BF16


@dataclass(frozen=True)
class ServingMemory:
    """Bytes: of weights, keys and values (of a token and of all) and the encoder's features on the GPU; of
    frames as decoded and of tiles (`pixels`) on the host."""

    weights: int
    kv_token: int
    kv: int
    features: int
    frames: int
    pixels: int

    @property
    def gpu(self) -> int:
        return self.weights + self.kv + self.features

    @property
    def host(self) -> int:
        return self.frames + self.pixels


def kv_bytes_per_token(eagle: EagleConfig, element: int = BF16) -> int:
    """Keys and values of one token in every layer."""
    text = eagle.text
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * element


def serving_memory(eagle: EagleConfig, prompt: ServedPrompt) -> ServingMemory:
    """Of one prompt, the model in bf16 and whole on one GPU."""
    text, shapes = eagle.text, PackShapes(eagle, ParallelConfig(), prompt.length)
    # An export is without the rows that training fills its tables with.
    filling = (shapes.vocabulary - text.vocab_size) * text.hidden_size * (2 - text.tie_word_embeddings)
    kv = kv_bytes_per_token(eagle, prompt.kv_bytes)
    return ServingMemory(
        weights=BF16 * (count_parameters(shapes, StageShapes.of(shapes, 0)).total - filling),
        kv_token=kv,
        kv=kv * prompt.length,
        features=BF16 * prompt.tiles * eagle.tokens_per_tile * text.hidden_size,
        frames=3 * prompt.frames * prompt.width * prompt.height,
        pixels=FP32 * prompt.tiles * eagle.vision.num_channels * eagle.vision.image_size**2,
    )


def render_serving(eagle: EagleConfig, prompt: ServedPrompt, gpu: Gpu | None = None) -> str:
    """As text, memory in GB of 10^9 bytes; with a GPU also what it has room for."""
    found = serving_memory(eagle, prompt)
    shown = prompt.tiles * (eagle.tokens_per_tile + 2) + LABEL * prompt.frames
    trained, size = eagle.text.max_position_embeddings, f"{prompt.width} x {prompt.height}"
    lines = [
        f"a prompt of {prompt.length:,} tokens with its answer; {prompt.tiles:,} tiles, {prompt.frames:,} "
        f"of them frames, are {shown:,} tokens with the frames' labels",
        *(["it does not hold them: show fewer, or serve a greater length"] * (shown > prompt.length)),
        *([f"it goes beyond the {trained:,} tokens of max_position_embeddings"] * (prompt.length > trained)),
        "",
        _row("weights, bf16", found.weights),
        _row("keys and values", found.kv, f"{found.kv_token:,} bytes a token"),
        _row("what the encoder gives", found.features),
        _row("together, on the GPU", found.gpu, "and what a step computes with"),
        "",
        _row("frames on the host", found.frames, f"{size} as decoded"),
        _row("tiles on the host", found.pixels, "fp32"),
    ]
    if gpu is not None:
        room = int(VLLM_SHARE * gpu.memory - found.weights - found.features)
        tokens = max(0, room // found.kv_token)
        lines += [
            "",
            f"{gpu.name} with {gpu.memory / 1e9:g} GB, of which vLLM takes {VLLM_SHARE:.0%}: at most "
            f"{tokens:,} tokens of keys and values, {tokens / prompt.length:.1f} such prompts at once",
        ]
    return "\n".join(lines)


def serving_record(eagle: EagleConfig, prompt: ServedPrompt) -> dict[str, Any]:
    """The numbers for JSON, in bytes."""
    found = serving_memory(eagle, prompt)
    return {"prompt": vars(prompt), "bytes": {**vars(found), "gpu": found.gpu, "host": found.host}}


def _row(what: str, count: int, more: str = "") -> str:
    return f"  {what:<24}{count / 1e9:9.3f} GB{f'   {more}' if more else ''}"
