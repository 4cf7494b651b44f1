"""Which parallel layouts a model and a sequence length allow, checked before any process group exists."""

from megatron_eagle.errors import UserError
from megatron_eagle.model.presets import EagleConfig
from megatron_eagle.runtime.parallel import ParallelConfig


def check_layout(eagle: EagleConfig, parallel: ParallelConfig, sequence_length: int) -> None:
    """Check sizes that a layout divides.

    Args:
        sequence_length: tokens of a pack (`data.length`).
    Raises:
        UserError: the first rule that does not hold, its values, and legal ones.
    """
    vision, text = eagle.vision, eagle.text
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    divided_by_tp = {
        "query heads of the language model": text.num_attention_heads,
        "key-value heads of the language model": text.num_key_value_heads,
        "feed-forward features of the language model": text.intermediate_size,
        "heads of the vision tower": vision.num_attention_heads,
        "feed-forward features of the vision tower": vision.intermediate_size,
    }
    legal = [n for n in range(1, 65) if not any(size % n for size in divided_by_tp.values())]
    for name, size in divided_by_tp.items():
        if size % tp:
            raise UserError(
                f"parallel.tensor_model_parallel_size {tp} does not divide the {size} {name}: "
                f"choose {_choices(legal)}"
            )
    stages = pp * parallel.num_model_chunks
    if text.num_hidden_layers % stages:
        divisors = [n for n in range(1, text.num_hidden_layers + 1) if text.num_hidden_layers % n == 0]
        raise UserError(
            f"{text.num_hidden_layers} language layers cannot be cut into {stages} equal stages: choose "
            f"pipeline_model_parallel_size x virtual_pipeline_model_parallel_size among {_choices(divisors)}"
        )
    # Zigzag cuts the sequence into 2 x CP chunks, sequence parallelism cuts a rank's tokens by TP.
    chunks = 2 * cp if cp > 1 else 1
    multiple = chunks
    if parallel.sequence_parallel:
        while multiple % chunks or (multiple // cp) % tp:
            multiple += chunks
    if sequence_length % multiple:
        nearest = max(round(sequence_length / multiple), 1) * multiple
        raise UserError(
            f"data.length {sequence_length} must be a multiple of {multiple} for context_parallel_size {cp}"
            f"{f' with sequence parallelism over {tp}' if parallel.sequence_parallel else ''}: "
            f"the nearest is {nearest}"
        )


def _choices(values: list[int]) -> str:
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last
