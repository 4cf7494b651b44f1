"""Collectives of training, heard as they are called; one can be dropped or doubled.

The communication itself always takes place, so that no rank waits for another in vain; what changes is what
it delivers. Dropped, a rank is left with what it had: its own addend, its own part of what is gathered and
zeros for the others', the buffer that a broadcast would have filled. Doubled, it gets twice the result. What
is sent is changed before it leaves. Objects (errors that ranks agree on) have no double.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from tests.mutants.sites import Sites, caller

Pairs = list[tuple[Tensor, Tensor]]  # of an output and what it would hold without the other ranks
Listener = Callable[[str], str | None]  # from a site to "dropped", "doubled" or None: leave it as it is


def _before(group, tensors, *_) -> Pairs:
    return [(tensor, tensor.clone()) for tensor in tensors]


def _nothing(group, tensors, *_) -> Pairs:
    return [(tensor, torch.zeros_like(tensor)) for tensor in tensors]


def _slots(group, slots: Sequence[Tensor], own: Tensor) -> Pairs:
    """Places for every rank's part, of which only this rank's would be filled."""
    filled = own.detach().clone().view(-1)
    return [
        (slot.view(-1), filled if rank == group.rank() else torch.zeros_like(slot.view(-1)))
        for rank, slot in enumerate(slots)
    ]


def _gathered(group, output, own, *_) -> Pairs:
    return _slots(group, output.view(-1).chunk(group.size()), own)


def _scattered(group, output, whole, *_) -> Pairs:
    return [(output.view(-1), whole.reshape(-1).chunk(group.size())[group.rank()].clone())]


def _exchanged(group, output, sent, receive_counts=(), send_counts=(), *_) -> Pairs:
    share = len(output) // group.size(), len(sent) // group.size()
    slots = output.split(list(receive_counts) or share[0])
    return _slots(group, slots, sent.split(list(send_counts) or share[1])[group.rank()].contiguous())


def _from_root(group, outputs, inputs, *_) -> Pairs:
    if inputs:
        return [(o, parts[group.rank()].clone()) for o, parts in zip(outputs, inputs, strict=True)]
    return _nothing(group, outputs)


def _each(single: Callable[..., Pairs]) -> Callable[..., Pairs]:
    """For several tensors in one call."""

    def pairs(group, outputs, inputs, *_) -> Pairs:
        return [p for one in zip(outputs, inputs, strict=False) for p in single(group, *one)]

    return pairs


# The data-carrying methods of a process group; all of torch.distributed's functions end in one of them.
METHODS: dict[str, Callable[..., Pairs]] = {
    "allreduce": _before,
    "allreduce_coalesced": _before,
    "reduce": _before,
    "broadcast": _before,
    "send": _before,
    "recv": _nothing,
    "recv_anysource": _nothing,
    "allgather": _each(_slots),
    "all_gather_single": _gathered,
    "all_gather_single_coalesced": _each(_gathered),
    "reduce_scatter": _each(lambda group, output, parts: [(output, parts[group.rank()].clone())]),
    "reduce_scatter_single": _scattered,
    "reduce_scatter_single_coalesced": _each(_scattered),
    "all_to_all_single": _exchanged,
    "alltoall": lambda group, outputs, inputs, *_: _slots(group, outputs, inputs[group.rank()]),
    "gather": _each(_slots),
    "scatter": _from_root,
}
ALIASES = {
    "_allgather_base": "all_gather_single",
    "allgather_into_tensor_coalesced": "all_gather_single_coalesced",
    "_reduce_scatter_base": "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_single_coalesced",
    "alltoall_base": "all_to_all_single",
}
# Functions for objects, and the arguments that they write their results to.
_OBJECT_LISTS = ("object_list", "object_gather_list", "scatter_object_output_list")
OBJECTS = ("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list")


@contextlib.contextmanager
def heard(listen: Listener) -> Iterator[None]:
    """Within it, `listen` is told of each collective of training over more than one rank."""
    ear = _Ear(listen)
    with contextlib.ExitStack() as stack:
        for name in (*METHODS, *ALIASES):
            method = ear.method(ALIASES.get(name, name), getattr(dist.ProcessGroup, name))
            stack.enter_context(patch.object(dist.ProcessGroup, name, method))
        for name in OBJECTS:
            stack.enter_context(patch.object(dist, name, ear.object_function(name, getattr(dist, name))))
        stack.enter_context(patch.object(torch.autograd.Function, "apply", ear.apply()))
        stack.enter_context(patch.object(DistributedDataParallel, "__init__", ear.wrapper_init()))
        yield


class _Ear:
    """Replacements for what leads to collectives; they tell `listen` and do as it says."""

    def __init__(self, listen: Listener) -> None:
        self._listen, self._sites, self._in_object = listen, Sites(), False

    def method(self, kind: str, original: Callable) -> Callable:
        def call(group, *args, **kwargs):
            site = None
            if group.size() > 1 and not self._in_object:
                site = self._sites.name(caller(1), kind)
            how = site and self._listen(site)
            if not how:
                return original(group, *args, **kwargs)
            with torch.no_grad():
                pairs = METHODS[kind](group, *args)
                if kind == "send":
                    sent = [2 * t if how == "doubled" else torch.zeros_like(t) for t in args[0]]
                    return original(group, sent, *args[1:], **kwargs)
            return _Work(original(group, *args, **kwargs), pairs, how)

        return call

    def object_function(self, kind: str, original: Callable) -> Callable:
        def call(*args, **kwargs):
            outer, self._in_object = self._in_object, True
            try:
                site = None if outer else self._sites.name(caller(1), kind)
                how = site and self._listen(site)
                given = inspect.signature(original).bind(*args, **kwargs).arguments
                result = [given.get(name) for name in _OBJECT_LISTS if given.get(name) is not None]
                before = [list(objects) for objects in result]
                value = original(*args, **kwargs)
                if how == "dropped":
                    for objects, had in zip(result, before, strict=True):
                        if kind.endswith("gather_object"):
                            own = dist.get_rank(given.get("group"))
                            had[own] = objects[own]
                        objects[:] = had
                return value
            finally:
                self._in_object = outer

        return call

    def apply(self) -> classmethod:
        original = torch.autograd.Function.__dict__["apply"].__func__

        def apply(cls, *args, **kwargs):
            output = original(cls, *args, **kwargs)
            self._sites.tag(output, caller(1))
            return output

        return classmethod(apply)

    def wrapper_init(self) -> Callable:
        original = DistributedDataParallel.__init__

        def __init__(wrapper, *args, **kwargs):
            original(wrapper, *args, **kwargs)
            self._sites.learn(wrapper)

        return __init__


class _Work:
    """A `Work` whose results are changed when they are waited for."""

    def __init__(self, work, pairs: Pairs, how: str) -> None:
        self._work, self._pairs, self._how = work, pairs, how

    def wait(self, *args) -> bool:
        self._work.wait(*args)
        pairs, self._pairs = self._pairs, []
        with torch.no_grad():
            for output, own in pairs:
                if self._how == "dropped":
                    output.copy_(own.view_as(output))
                else:
                    output.mul_(2)
        return True

    def __getattr__(self, name):
        return getattr(self._work, name)
