"""Which parallel layouts a model and a sequence length allow, checked before any process group exists."""

import math

from megatron_eagle.context_parallel.planning import MOST_TOKENS, sequence_multiple
from megatron_eagle.context_parallel.ulysses import divides_heads
from megatron_eagle.errors import UserError
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.model.shapes import LocalShapes
from megatron_eagle.model.text import ExpertsConfig
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
        "heads of the vision encoder": vision.num_attention_heads,
        "feed-forward features of the vision encoder": vision.intermediate_size,
        "padded vocabulary rows": text.padded_vocab_size,
    }
    if text.experts is None:
        divided_by_tp["feed-forward features of the language model"] = text.intermediate_size
    legal = [n for n in range(1, 65) if not any(size % n for size in divided_by_tp.values())]
    for name, size in divided_by_tp.items():
        if size % tp:
            raise UserError(
                f"parallel.tensor_model_parallel_size {tp} does not divide the {size} {name}: "
                f"choose {_choices(legal)}"
            )
    _check_experts(text.experts, parallel)
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


def _check_experts(experts: ExpertsConfig | None, parallel: ParallelConfig) -> None:
    size, tp = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    if experts is None:
        for name, given in (
            ("expert_model_parallel_size", size > 1),
            ("expert_tensor_parallel_size", parallel.expert_tensor_parallel_size is not None),
        ):
            if given:
                raise UserError(
                    f"parallel.{name} {getattr(parallel, name)} divides experts, and the model has none: "
                    "leave it out"
                )
        return
    features = experts.moe_intermediate_size
    if features % parallel.expert_tensor_size:
        raise UserError(
            f"parallel.expert_tensor_parallel_size {parallel.expert_tensor_size} does not divide the "
            f"{features} feed-forward features of an expert: set it to 1"
        )
    if tp > 1 and not parallel.sequence_parallel:
        raise UserError(
            f"parallel.tensor_model_parallel_size {tp} without sequence_parallel would send every token to "
            f"its experts {tp} times: set sequence_parallel to true"
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
    ends = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
    given = [name for name in ends if getattr(parallel, name) is not None]
    sizes = [getattr(parallel, name) for name in given]
    if parallel.pipeline_model_parallel_layout is not None:
        _check_letters(layers, parallel, given)
        return
    if not given:
        if layers % (stages * chunks):
            divisors = [n for n in range(1, layers + 1) if layers % n == 0]
            raise UserError(
                f"{layers} language layers cannot be cut into {stages * chunks} equal stages: choose "
                f"pipeline_model_parallel_size x virtual_pipeline_model_parallel_size among "
                f"{_choices(divisors)}, or set num_layers_in_first_pipeline_stage"
            )
        return
    if stages == 1:
        raise UserError(f"parallel.{given[0]} needs pipeline_model_parallel_size > 1")
    *others, size = sizes
    between = stages - len(given)

    def leaves_equal_shares(n: int) -> bool:
        rest: int = layers - sum(others) - n
        return rest >= between * chunks and rest % (between * chunks) == 0 if between else rest == 0

    legal = [n for n in range(chunks, layers, chunks) if leaves_equal_shares(n)]
    if size not in legal or any(other % chunks for other in others):
        beside = f" beside {given[0]} {others[0]}" if others else ""
        raise UserError(
            f"parallel.{given[-1]} {size} of {layers} language layers{beside} leaves no equal shares for "
            f"{between} further stages x {chunks} chunks: choose {_choices(legal)}"
        )


def _check_letters(layers: int, parallel: ParallelConfig, given: list[str]) -> None:
    """`pipeline_model_parallel_layout`: one E, then `layers` times t, then one L; no stage without work."""
    layout, chunks = parallel.pipeline_model_parallel_layout, parallel.stage_layers(layers)
    assert layout is not None, "it was looked for"
    what = f"parallel.pipeline_model_parallel_layout {layout!r}"
    if given:
        raise UserError(f"{what} says what parallel.{given[0]} says: leave one out")
    found = sum(map(sum, chunks))
    if found != layers:
        raise UserError(f"{what} has {found} layers (t) and the language model has {layers}")
    if (layout.count("E"), layout.count("L")) != (1, 1) or layout[0] != "E" or layout[-1] != "L":
        raise UserError(f"{what}: the embedding (E) stands first and the loss (L) last, each once")
    last = len(chunks) - 1, len(chunks[0]) - 1
    for chunk in range(len(chunks[0])):
        for stage, sizes in enumerate(chunks):
            if sizes[chunk] == 0 and (stage, chunk) not in ((0, 0), last):
                raise UserError(
                    f"{what}: part {chunk * len(chunks) + stage + 1} is empty; give it a layer (t)"
                )


def _shown_layout(parallel: ParallelConfig) -> str:
    if parallel.context_parallel_size == 1:
        return ""
    name, chunk_size = parallel.context_parallel_layout, parallel.context_parallel_chunk_size
    return f" ({name}, chunks of {chunk_size})" if name == "balanced" and chunk_size else f" ({name})"


def _choices(values: list[int]) -> str:
    *most, last = [str(value) for value in values] or ["another pipeline_model_parallel_size"]
    return f"{', '.join(most)} or {last}" if most else last
