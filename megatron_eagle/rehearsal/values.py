"""Values of small index tensors on the GPU that is not there, where they follow from what the host knows.

How many rows go to whose experts is computed on the device and then read by the host. So what the host has
copied to the device is kept beside it, and what operators make of it is computed on both sides, for integers
and booleans.

Which experts a token is sent to is known of real tokens alone. Here it is made up, evenly: every expert of a
layer has as many rows as any other, or one more. All ranks of a group that gather such counts have the same.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_aten = torch.ops.aten
_LARGEST = 1 << 24  # elements
_KEPT = (torch.bool, torch.int32, torch.int64)
_FILLING = {
    f"aten::{name}"
    for name in ("zeros", "zeros_like", "new_zeros", "ones", "full", "full_like", "arange", "zero_", "fill_")
}


def even_choice(rows: int, k: int, among: int) -> Tensor:
    """int64 [rows, k]: k different ones of `among` for each row, all of them equally often or once more."""
    return (torch.arange(rows * k) % among).view(rows, k)


class Values:
    """By storage: a host tensor with the elements of all of it."""

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor | None:
        """Those of a tensor or of a view of one; None: nobody knows them."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is None or known.dtype != tensor.dtype:
            return None
        return known.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def remember(self, tensor: Tensor, values: Tensor) -> None:
        """`tensor` has these from here on; pixels, floating point numbers and many nobody keeps."""
        assert not isinstance(values, FakeTensor), "nobody knows them"
        storage = tensor.untyped_storage()
        key, elements = storage._cdata, storage.nbytes() // tensor.element_size()
        if tensor.dtype not in _KEPT or elements > _LARGEST:
            return
        if self.of(tensor) is None:
            if tensor.numel() != elements:
                return  # what lies beside this view is not known
            if key not in self._known:
                weakref.finalize(storage, self._known.pop, key, None)
            self._known[key] = torch.zeros(elements, dtype=tensor.dtype)
        kept = self.of(tensor)
        assert kept is not None, "it has just been kept"
        kept.copy_(values)

    def forget(self, tensor: Tensor) -> None:
        """It has been written into by something that is not followed."""
        self._known.pop(tensor.untyped_storage()._cdata, None)

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An operator has made `out` of these: on the host the same."""
        if func.is_view:
            return
        if func is _aten.topk.default:
            rows, among = args[0].numel() // args[0].shape[-1], args[0].shape[-1]
            self.remember(out[1], even_choice(rows, args[1], among).view(out[1].shape))
            return
        made = [each for each in tensors_in(out) if not each.dtype.is_floating_point]
        given = [each for each in tensors_in((args, kwargs)) if isinstance(each, FakeTensor)]
        filled = func._schema.name in _FILLING
        known = filled or (bool(given) and all(self.of(each) is not None for each in given))
        if not made or not known or any(each.numel() > _LARGEST for each in made):
            for each in made if func._schema.is_mutable else ():
                self.forget(each)
            return
        where = {"device": torch.device("cpu")} if "device" in kwargs else {}
        results = func(*self._on_host(args), **self._on_host(kwargs) | where)
        for each, values in zip(tensors_in(out), tensors_in(results), strict=True):
            self.remember(each, values)

    def _on_host(self, tree: Any) -> Any:
        """The same with values in place of tensors without; with any, where it matters to nobody."""
        if isinstance(tree, FakeTensor):
            known = self.of(tree)
            return torch.empty(tree.shape, dtype=tree.dtype) if known is None else known
        if isinstance(tree, dict):
            return {name: self._on_host(value) for name, value in tree.items()}
        return type(tree)(map(self._on_host, tree)) if isinstance(tree, list | tuple) else tree


def tensors_in(tree: Any) -> list[Tensor]:
    """All that lists, tuples and dictionaries have."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for part in tree for tensor in tensors_in(part)]
