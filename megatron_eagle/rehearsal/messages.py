"""What a rank tells others: every collective and message as the code issues it, and what it waits for.

The same recorder listens in a rehearsal and in a run on gloo, at the one door that all of them go through:
torch's `c10d` operators. Objects that are pickled are one message each, without a size.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eagle.rehearsal.patches import Patch
from megatron_eagle.rehearsal.places import place

WORLD = "WORLD"
SEND, RECEIVE = "send", "receive"
_NAMES = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather_list",
    "allgather_into_tensor_coalesced_": "all_gather_coalesced",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter_list",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter_coalesced",
    "allreduce_coalesced_": "all_reduce_coalesced",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "barrier": "barrier",
    "send": SEND,
    "recv_": RECEIVE,
}
_GROUP_TYPE = "__torch__.torch.classes.c10d.ProcessGroup"
_OBJECTS = ("all_gather_object", "gather_object", "broadcast_object_list")


@dataclass(frozen=True)
class RankMessage:
    """A collective, or one end of a message between two ranks, as one rank issues it."""

    group: str  # its description
    nth: int  # among the groups of that description that the rank is in
    op: str
    tensors: tuple[tuple[str, tuple[int, ...]], ...]  # type and shape: what is received, then what is sent
    peer: int | None = None  # the other end's place in the group, or the root's
    reduction: str | None = None  # of a collective that reduces: SUM, AVG, MAX, ...
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # rows received and sent, by rank
    batch: int | None = None  # of `batch_isend_irecv`: they go together
    phase: str = ""
    place: str = ""

    @property
    def what(self) -> tuple[Any, ...]:
        """All but where it comes from."""
        return self.group, self.nth, self.op, self.tensors, self.peer, self.reduction, self.splits

    @property
    def nbytes(self) -> int:
        """Bytes of the largest of its tensors' lists, sent or received."""
        sizes = [_nbytes(dtype, shape) for dtype, shape in self.tensors]
        if self.op in (SEND, RECEIVE, "broadcast", "all_reduce", "all_reduce_coalesced", "reduce"):
            return sum(sizes)
        half = len(sizes) // 2
        return max(sum(sizes[:half]), sum(sizes[half:]))

    def __str__(self) -> str:
        between = "with" if self.op in (SEND, RECEIVE) else "root"
        peer = "" if self.peer is None else f" {between} {self.peer}"
        reduction = "" if self.reduction is None else f" {self.reduction}"
        tensors = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in self.tensors[:3])
        splits = "" if self.splits is None else f" rows {list(self.splits[0])} <- {list(self.splits[1])}"
        more = f" and {len(self.tensors) - 3} more" if len(self.tensors) > 3 else ""
        return f"{self.op}{reduction}{peer} {tensors}{more}{splits}"


@dataclass(frozen=True)
class Wait:
    """What is computed from here on comes after message number `message` of this rank has ended."""

    message: int


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    size: int = getattr(torch, dtype).itemsize
    for length in shape:
        size *= length
    return size


class Recorder(TorchDispatchMode):
    """Listens while it is entered; `patches` are to be applied around the making of groups, too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[RankMessage | Wait] = []
        self.families: dict[str, list[tuple[int, ...]]] = {}  # all groups of the job, by description
        self.phase = "start"
        self._groups: dict[str, tuple[str, int]] = {}  # by torch's name
        self._works: dict[int, int] = {}  # message by the number of its work
        self._own: dict[str, int] = {}
        self._alone: set[str] = set()  # groups, by torch's name, of this rank, that no other makes
        self._batch: int | None = None
        self._batches = self._messages = 0
        self._last: int | None = None  # number of what was issued last, if it is a message
        self._quiet = threading.local()

    @property
    def messages(self) -> list[RankMessage]:
        """Without the waits."""
        return [event for event in self.events if isinstance(event, RankMessage)]

    def note(self, message: RankMessage) -> int:
        """Its number."""
        self.events.append(message)
        self._messages += 1
        return self._messages - 1

    def note_wait(self, work: int) -> None:
        """The work of this number (`FakeWork.seq_id`) is waited for."""
        number = self._works.pop(work, None)
        if number is not None:
            self.events.append(Wait(number))

    def knows_work(self, work: int) -> None:
        """That of what was issued last."""
        if self._last is not None:
            self._works[work] = self._last

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self.see(func, args)
        return func(*args, **(kwargs or {}))

    def see(self, func: Any, args: tuple[Any, ...]) -> None:
        """An operator of c10d is called."""
        if getattr(self._quiet, "now", False):
            return
        name = func._schema.name.partition("::")[2]
        if name not in _NAMES:
            raise NotImplementedError(f"c10d.{name} is a way to communicate that is not recorded yet")
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        group = next(
            dist.ProcessGroup.unbox(a)
            for a in args
            if isinstance(a, torch._C.ScriptObject) and str(a._type()) == _GROUP_TYPE
        )
        if group.group_name in self._alone:
            self._last = None
            return
        description, nth = self._groups.get(group.group_name, (WORLD, 0))
        tensors = [] if name == "barrier" else [t for a in args for t in _flat(a)]
        splits = None
        if name == "alltoall_base_":
            splits = tuple(named["output_split_sizes"]), tuple(named["input_split_sizes"])
        message = RankMessage(
            description,
            nth,
            _NAMES[name],
            tuple((str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in tensors),
            next((named[key] for key in ("dst", "src", "root_rank") if key in named), None),
            _reduction(named["reduce_op"]) if "reduce_op" in named else None,
            splits,
            self._batch,
            self.phase,
            place(2),
        )
        self._last = self.note(message)

    @contextmanager
    def _silence(self) -> Iterator[None]:
        self._quiet.now = True
        try:
            yield
        finally:
            self._quiet.now = False

    def _note_object(self, op: str, arguments: dict[str, Any]) -> None:
        group: dist.ProcessGroup | None = arguments["group"]
        name = "" if group is None else group.group_name
        whose = self._groups.get(name, (WORLD, 0))
        message = RankMessage(*whose, op, (), _root(arguments), phase=self.phase, place=place(2))
        self.events.append(Wait(self.note(message)))

    def patches(self) -> list[Patch]:
        """New groups, objects and batches of messages."""
        new_group, batch = dist.new_group, dist.batch_isend_irecv

        def recorded_new_group(ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
            group = new_group(ranks, *args, **kwargs)
            members = tuple(range(dist.get_world_size()) if ranks is None else ranks)
            if kwargs.get("use_local_synchronization") and members == (dist.get_rank(),):
                self._alone.add(group.group_name)  # none waits for another
                return group
            description = kwargs.get("group_desc") or "unnamed"
            self.families.setdefault(description, []).append(members)
            if dist.get_rank() in members:
                nth = self._own.get(description, 0)
                self._own[description] = nth + 1
                self._groups[group.group_name] = description, nth
            return group

        def recorded_batch(operations: list[Any]) -> Any:
            self._batches += 1
            self._batch = self._batches
            try:
                return batch(operations)
            finally:
                self._batch = None

        def recorded_object(op: str) -> Callable[..., Any]:
            function = getattr(dist, op)
            signature = inspect.signature(function)

            def call(*args: Any, **kwargs: Any) -> Any:
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                self._note_object(op, bound.arguments)
                with self._silence():
                    return function(*args, **kwargs)

            return call

        return [
            (dist, "new_group", recorded_new_group),
            (dist, "batch_isend_irecv", recorded_batch),
            *((dist, op, recorded_object(op)) for op in _OBJECTS),
        ]


def _reduction(op: Any) -> str:
    """The name of a `c10d.ReduceOp`, as operators take it."""
    name: str = dist.ReduceOp.RedOpType(op._get_method("op")()).name
    return name


def _root(arguments: dict[str, Any]) -> int | None:
    """The root's place in its group, of a collective of objects; None: it has none."""
    for end in ("src", "dst"):
        if end in arguments:
            place_in_group, rank = arguments[f"group_{end}"], arguments[end] or 0
            if place_in_group is not None:
                return int(place_in_group)
            group = arguments["group"]
            return int(rank) if group is None else dist.get_group_rank(group, rank)
    return None


def _flat(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from _flat(part)
