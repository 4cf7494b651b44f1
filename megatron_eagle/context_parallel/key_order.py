"""Keys in the order in which attention reads them, and their gradients back in the order in which they came.

Attention reads one run of keys per segment, so that one varlen call does all segments: keys that several
segments of a rank see occur once in each. Gradients return by tables of rows to add up, not by scattering:
sums have one order, and a table is one kernel however many segments there are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class KeyOrder:
    """From received rows to keys and back. r: rows received."""

    kv_rows: Tensor  # int64 [keys]: received row of each
    fold_rows: Tensor  # int64 [most, r]: keys whose gradients a received row adds up, `keys` for none

    @classmethod
    def of(
        cls, documents: np.ndarray, sizes: np.ndarray, kv_rows: np.ndarray, num_received: int
    ) -> "KeyOrder | None":
        """The order in which segments read; None: that in which rows came.

        Args:
            documents: int [segments], equal where segments are of one document.
            sizes: int [segments]: keys of each.
            kv_rows: int [keys]: their received rows, segment after segment.
        """
        if len(kv_rows) == num_received and bool((kv_rows == np.arange(num_received)).all()):
            return None
        folds = _fold_rows(documents, sizes, kv_rows, num_received)
        return cls(torch.from_numpy(kv_rows), torch.from_numpy(folds))

    def each(self, function: Callable[[Tensor], Tensor]) -> "KeyOrder":
        """The same with `function` of its index tensors."""
        return KeyOrder(function(self.kv_rows), function(self.fold_rows))


def read_keys(kv: Tensor, order: KeyOrder | None) -> tuple[Tensor, Tensor]:
    """Received rows [r, 2, h, d] -> keys and values [keys, h, d] as attention reads them."""
    keys, values = (kv if order is None else kv.index_select(0, order.kv_rows)).unbind(1)
    return keys, values


def fold_gradients(grad_k: Tensor, grad_v: Tensor, order: KeyOrder | None) -> Tensor:
    """Gradients [keys, h, d] as attention reads keys -> fp32 [r, 2, h, d] of the received rows."""
    if order is None:
        return torch.stack([grad_k, grad_v], dim=1).float()
    keys, *shape = grad_k.shape
    grad = grad_k.new_empty((keys + 1, 2, *shape), dtype=torch.float32)
    grad[:keys, 0], grad[:keys, 1], grad[keys] = grad_k, grad_v, 0
    return sum_rows(grad, order.fold_rows)


def sum_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Sums of rows of x, which ends with a row of zeros for "none": rows [m, n] -> [n, ...]."""
    first, *others = rows
    total = x.index_select(0, first)
    for more in others:
        total += x.index_select(0, more)
    return total


def _fold_rows(
    documents: np.ndarray, sizes: np.ndarray, kv_rows: np.ndarray, num_received: int
) -> np.ndarray:
    """Where each received row occurs among the keys: once in some of its document's segments."""
    _, document, count = np.unique(documents, return_inverse=True, return_counts=True)
    order = np.argsort(document, kind="stable")
    number = np.empty(len(documents), dtype=np.int64)  # of the segment among its document's
    number[order] = np.arange(len(documents)) - np.repeat(count.cumsum() - count, count)
    folds = np.full((count.max(), num_received), len(kv_rows))
    folds[np.repeat(number, sizes), kv_rows] = np.arange(len(kv_rows))
    return folds
