"""Which parallel layouts a model and a sequence length allow, checked before any process group exists."""

import math

from megatron_eagle.context_parallel.planning import MOST_TOKENS, sequence_multiple
from megatron_eagle.context_parallel.ulysses import divides_heads
from megatron_eagle.errors import UserError
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.shapes import LocalShapes
from megatron_eagle.runtime.parallel import ParallelConfig


def check_layout(eagle: EagleConfig, parallel: ParallelConfig, length: int) -> None:
    """Check sizes that a layout divides.

    Args:
        eagle: with its vocabulary, which may be the data's.
        length: tokens of a pack (`data.length`), of which `parallel.packs` lie end to end.
    Raises:
        UserError: the first rule that does not hold, its values, and legal ones.
    """
    vision, text = eagle.vision, eagle.text
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    divided_by_tp = {
        "query heads of the language model": text.num_attention_heads,
        "KV heads of the language model": text.num_key_value_heads,
        "feed-forward features of the language model": text.intermediate_size,
        "heads of the vision encoder": vision.num_attention_heads,
        "feed-forward features of the vision encoder": vision.intermediate_size,
        "padded vocabulary rows": text.padded_vocab_size,
    }
    legal = [n for n in range(1, 65) if not any(size % n for size in divided_by_tp.values())]
    for name, size in divided_by_tp.items():
        if size % tp:
            raise UserError(
                f"parallel.tensor_model_parallel_size {tp} does not divide the {size} {name}: "
                f"choose {_choices(legal)}"
            )
    ulysses, shapes = parallel.ulysses_parallel_size, LocalShapes(eagle, parallel)
    heads = shapes.heads, shapes.kv_heads
    if not divides_heads(ulysses, *heads):
        legal = [n for n in range(1, cp + 1) if cp % n == 0 and divides_heads(n, *heads)]
        raise UserError(
            f"parallel.ulysses_parallel_size {ulysses} divides neither the {heads[1]} KV heads of a tensor "
            f"parallel rank ({text.num_key_value_heads} over {tp}) nor, as a multiple of them, its "
            f"{heads[0]} query heads: choose {_choices(legal)}; the other ranks exchange keys"
        )
    _check_stages(text.num_hidden_layers, parallel)
    if parallel.pad_documents:
        _check_padding(parallel)
    if parallel.packs > 1 and parallel.vision_sharding == "none":
        raise UserError(
            "parallel.vision_sharding none lets every rank encode the tiles of all the packs of "
            f"data.packs_per_sequence {parallel.packs}: choose cp or cp_tp, or 1 pack"
        )
    if parallel.packs * length > MOST_TOKENS:
        raise UserError(
            f"data.packs_per_sequence {parallel.packs} x data.length {length}: attention kernels count "
            f"positions in int32, at most {MOST_TOKENS // length} packs"
        )
    multiple = pack_multiple(parallel)
    multiple //= math.gcd(multiple, parallel.packs)
    if length % multiple:
        nearest = max(round(length / multiple), 1) * multiple
        raise UserError(
            f"data.length {length} must be a multiple of {multiple} for {parallel.shown_context}"
            f"{_shown_layout(parallel)}"
            f"{f' with sequence parallelism over {tp}' if parallel.sequence_parallel else ''}: "
            f"the nearest is {nearest}"
        )


def pack_multiple(parallel: ParallelConfig) -> int:
    """What the length of a sequence must be a multiple of."""
    ulysses = parallel.ulysses_parallel_size
    return sequence_multiple(
        parallel.context_parallel_layout,
        parallel.context_parallel_size // ulysses,
        ulysses,
        sequence_parallel=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
        chunk_size=parallel.context_parallel_chunk_size,
    )


def _check_padding(parallel: ParallelConfig) -> None:
    if parallel.context_parallel_layout != "zigzag_per_document":
        raise UserError(
            f"parallel.pad_documents has no use with context_parallel_layout "
            f"{parallel.context_parallel_layout}: set it to false, or the layout to zigzag_per_document"
        )
    if parallel.pipeline_model_parallel_size > 1:
        raise UserError(
            "parallel.pad_documents makes packs of different lengths and pipeline stages hand on one length: "
            "set it to false, or pipeline_model_parallel_size to 1"
        )


def _check_stages(layers: int, parallel: ParallelConfig) -> None:
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.num_model_chunks
    first = parallel.num_layers_in_first_pipeline_stage
    if first is None:
        if layers % (stages * chunks):
            divisors = [n for n in range(1, layers + 1) if layers % n == 0]
            raise UserError(
                f"{layers} language layers cannot be cut into {stages * chunks} equal stages: choose "
                f"pipeline_model_parallel_size x virtual_pipeline_model_parallel_size among "
                f"{_choices(divisors)}, or set num_layers_in_first_pipeline_stage"
            )
        return
    if stages == 1:
        raise UserError("parallel.num_layers_in_first_pipeline_stage needs pipeline_model_parallel_size > 1")
    legal = [
        n
        for n in range(chunks, layers, chunks)
        if (layers - n) % ((stages - 1) * chunks) == 0 and layers - n >= (stages - 1) * chunks
    ]
    if first not in legal:
        raise UserError(
            f"parallel.num_layers_in_first_pipeline_stage {first} of {layers} language layers leaves no "
            f"equal shares for {stages - 1} further stages x {chunks} chunks: choose {_choices(legal)}"
        )


def _shown_layout(parallel: ParallelConfig) -> str:
    if parallel.context_parallel_size == 1:
        return ""
    name, chunk_size = parallel.context_parallel_layout, parallel.context_parallel_chunk_size
    return f" ({name}, chunks of {chunk_size})" if name == "balanced" and chunk_size else f" ({name})"


def _choices(values: list[int]) -> str:
    *most, last = [str(value) for value in values] or ["another pipeline_model_parallel_size"]
    return f"{', '.join(most)} or {last}" if most else last
