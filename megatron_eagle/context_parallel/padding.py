"""Documents filled up to a multiple of so many tokens, which Transformer Engine's context parallelism needs.

The data stay as they are: padding is put in when a pack is divided over ranks. It stands at the end of its
document, where causality hides it from every other token, and weighs nothing in the loss.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_eagle.context_parallel.layout import expand
from megatron_eagle.context_parallel.planning import check_documents


def pad_documents(
    length: int, document_bounds: Sequence[int], multiple: int, pack_multiple: int
) -> tuple[list[int], Tensor]:
    """Fill up every document of a pack.

    Args:
        length: tokens of the pack.
        document_bounds: 0, the ends of all documents but the last, and `length`.
        multiple: of every document's tokens.
        pack_multiple: of the pack's tokens, a multiple of `multiple`: the last document takes the rest.
    Returns:
        the bounds of the longer documents, and for each token of the longer pack the token of the pack that
        it is, int64, -1 for padding.
    Raises:
        UserError: as `check_documents`.
    """
    check_documents(length, document_bounds)
    bounds = np.asarray(document_bounds)
    sizes = np.diff(bounds)
    longer = -(-sizes // multiple) * multiple
    longer[-1] += -longer.sum() % pack_multiple
    ends = longer.cumsum()
    starts = ends - longer
    source = np.full(ends[-1], -1)
    source[expand(np.stack([starts, starts + sizes], axis=1))] = np.arange(length)
    return [0, *ends.tolist()], torch.from_numpy(source)
