"""The prompt's pass in pieces: activations of one piece, however long the prompt.

transformers 5 has `prefill_chunk_size`, but it splits token ids: a prompt given as embeddings, as pictures
are, goes through in one piece there.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def prefill(model: Any, input_ids: Tensor, pixel_values: Tensor | None, chunk: int) -> tuple[Any, Tensor]:
    """Fill the KV cache with all tokens of one prompt but the last.

    Args:
        model: an exported model.
        input_ids: [1, s], the last one a token of text.
        pixel_values: [n, 3, S, S] on any device, or None.
        chunk: tokens of one pass of the language model, and of the tiles that are encoded at once.

    Returns:
        The cache, s - 1 tokens long, and the embedding of the last token seen as that of all, [1, s, h]:
        transformers' `generate` reads of a prompt with a cache only what the cache lacks.

    Raises:
        ValueError: the number of image tokens and of features differ.
    """
    embed = model.get_input_embeddings()
    features = _Features(model, pixel_values, chunk)
    cache = None
    for ids in input_ids[:, :-1].split(chunk, dim=1):
        at_image = ids == model.image_token_index
        embeddings = embed(ids)
        if count := int(at_image.sum()):
            taken = features.take(count).to(embeddings)
            embeddings = embeddings.masked_scatter(at_image.unsqueeze(-1), taken)
        step = model.language_model.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
    features.check_all_taken()
    return cache, embed(input_ids[:, -1:]).expand(-1, input_ids.shape[1], -1)


class _Features:
    """Rows of visual features in reading order; tiles are encoded when they are asked for."""

    def __init__(self, model: Any, pixel_values: Tensor | None, chunk: int) -> None:
        self._encoded = iter(()) if pixel_values is None else _encode(model, pixel_values, chunk)
        self._left: Tensor | None = None

    def take(self, count: int) -> Tensor:
        """The next `count` rows, [count, h]."""
        parts = [] if self._left is None else [self._left]
        have = sum(map(len, parts))
        while have < count:
            part = next(self._encoded, None)
            if part is None:
                raise ValueError("the prompt has more image tokens than the pixels give visual features")
            parts.append(part)
            have += len(part)
        rows = torch.cat(parts)
        self._left = rows[count:].clone() if len(rows) > count else None
        return rows[:count]

    def check_all_taken(self) -> None:
        if self._left is not None or next(self._encoded, None) is not None:
            raise ValueError("the pixels give more visual features than the prompt has image tokens")


def _encode(model: Any, pixel_values: Tensor, chunk: int) -> Iterator[Tensor]:
    for tiles in pixel_values.split(max(1, chunk // model.config.tokens_per_tile)):
        yield model.extract_feature(tiles).flatten(0, 1)
