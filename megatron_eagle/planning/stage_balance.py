"""Language layers for each pipeline stage, so that all stages take equally long, in Megatron's letters
(`pipeline_model_parallel_layout`): the first stage also has the vision encoder, the last one the loss."""

from collections.abc import Sequence
from itertools import groupby


def balanced_layers(layers: int, stages: int, chunks: int, first: float, last: float) -> list[list[int]]:
    """How many of `layers` each stage has in each of its chunks.

    The first part may be the encoder alone and the last the loss; every other part has a layer. Of stages
    that would take equally long the later one gets the layer, which holds fewer microbatches.

    Args:
        first: what the first stage does beside its layers, in the time of one layer.
        last: the same of the last stage, which is another.
    Raises:
        ValueError: fewer layers than parts that need one.
    """
    least = [[1] * chunks for _ in range(stages)]
    least[0][0] = least[-1][-1] = 0
    beside = [[0.0] * chunks for _ in range(stages)]
    beside[0][0], beside[-1][-1] = first, last
    sizes = _filled(layers, [sum(stage) for stage in beside], [sum(stage) for stage in least])
    return [_filled(*stage) for stage in zip(sizes, beside, least, strict=True)]


def _filled(count: int, loads: Sequence[float], least: Sequence[int]) -> list[int]:
    """`count` layers dealt one by one to the place with the smallest load."""
    if count < sum(least):
        raise ValueError(f"{count} layers are fewer than {sum(least)} parts")
    found = list(least)
    for _ in range(count - sum(least)):
        place = min(range(len(found)), key=lambda place: (loads[place] + found[place], -place))
        found[place] += 1
    return found


def layout_letters(chunks: Sequence[Sequence[int]]) -> str:
    """`pipeline_model_parallel_layout` of the stages' layers by chunk; equal parts in a row are folded."""
    parts = [_layers(stage[chunk]) for chunk in range(len(chunks[0])) for stage in chunks]
    parts[0], parts[-1] = f"E{parts[0]}", f"{parts[-1]}L"
    runs = [(part, len(list(same))) for part, same in groupby(parts)]
    words = [f"({part}|)*{count}" if count > 2 else f"{part}|" * count for part, count in runs]
    return "".join(words)[:-1]  # the last part stands alone, for no other has an L


def _layers(count: int) -> str:
    return "t" * count if count < 3 else f"t*{count}"
