"""Tensors on a GPU that is not there: shapes, types, devices and strides, and no data. The host's stay real.

What the host asks of them it is told where that follows from what it knows itself (`values.py`). Other
answers are made up: a scalar is one (true), what is copied to the host is zeros. Every such question is
noted, for on a GPU the host would wait for its answer.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eagle.rehearsal.findings import Findings
from megatron_eagle.rehearsal.memory import Memory
from megatron_eagle.rehearsal.messages import Recorder
from megatron_eagle.rehearsal.values import Values, tensors_in
from megatron_eagle.rehearsal.work import Kernel, Work, attention_workspace, bytes_of, flops_of, has_workspace

_aten = torch.ops.aten
# Their kernels want one type, while fake ones let others pass.
_STRICT = {
    f"aten::{name}"
    for name in (
        "mm",
        "bmm",
        "addmm",
        "addmm_",
        "baddbmm",
        "dot",
        "convolution",
        "index_copy",
        "index_copy_",
        "index_add",
        "index_add_",
        "index_put_",
        "scatter_add_",
    )
} | {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::alltoall_base_"}
_NO_FAKE_KERNEL = (UnsupportedOperatorException, DynamicOutputShapeException, DataDependentOutputException)
_NUMBERS = {"BoolType": True, "IntType": 1, "FloatType": 1.0}
_INDEXING = {_aten.index.Tensor, _aten._unsafe_index.Tensor}
_INDEX_WRITING = {_aten.index_put_.default, _aten._index_put_impl_.default, _aten.index_put.default}


class FakeGpu(TorchDispatchMode):
    """Entered around all that a rank does. Calls the recorder itself: two modes would cost twice."""

    def __init__(
        self, findings: Findings, memory: Memory, work: Work, recorder: Recorder, multiprocessors: int
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._findings, self._memory, self._work, self._recorder = findings, memory, work, recorder
        self._multiprocessors = multiprocessors
        self._values = Values()
        self._pinned: dict[int, weakref.ref[Any]] = {}
        self._works = 0

    # ---- what the machine around it asks
    def pin(self, tensor: Tensor) -> Tensor:
        """A host tensor that copies need not wait for."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._pinned:
            self._pinned[key] = weakref.ref(storage, lambda _: self._pinned.pop(key, None))
        return tensor

    def known(self, tensor: Tensor) -> Tensor | None:
        """The values of a small index tensor; None: the device computed them of others."""
        return self._values.of(tensor)

    def values(self, tensor: Tensor) -> Tensor:
        """As `known`.

        Raises:
            KeyError: the device computed them of others.
        """
        values = self.known(tensor)
        if values is None:
            raise KeyError(f"the values of {tensor.dtype} {list(tensor.shape)} are not known")
        return values

    # ---- dispatch
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs))
        on_gpu = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs, tensors, bool(on_gpu))
        to_gpu = "device" in kwargs and kwargs["device"] is not None and kwargs["device"].type == "cuda"
        if not on_gpu and not to_gpu:
            return self._on_host(func, args, kwargs)
        moved = self._move(func, args, kwargs)
        if moved is not None:
            return moved
        asked = self._ask(func, args)
        if asked is not None:
            return asked
        if func._schema.name in _STRICT:
            # With a result type of its own, a product's factors are what must agree.
            self._check_types(func, list(args[1:3]) if "dtype" in func._overloadname else tensors)
        out = self._compute(func, args, kwargs, on_gpu)
        self._values.follow(func, args, kwargs, out)
        self._account(func, args, out, on_gpu)
        return out

    def _on_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        return self.pin(func(*args, **{**kwargs, "pin_memory": False}))

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Copies between host and device; None: it is none."""
        if func is _aten._to_copy.default:
            source = args[0]
            target = torch.device(kwargs.get("device") or source.device)
            if source.device.type == target.type:
                return None
            self._copied(source, target.type, source, kwargs.get("non_blocking", False))
            dtype = kwargs.get("dtype") or source.dtype
            if target.type == "cpu":
                known = self.known(source)
                return torch.zeros(source.shape, dtype=dtype) if known is None else known.to(dtype, copy=True)
            with self.fake:
                out = torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=target)
            self._memory.see(out)
            self._values.remember(out, source)
            return out
        if func is _aten.copy_.default and args[0].device.type != args[1].device.type:
            target, source = args[:2]
            if torch.broadcast_shapes(target.shape, source.shape) != target.shape:
                raise RuntimeError(f"copy_: {tuple(source.shape)} does not fit {tuple(target.shape)}")
            blocking = not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking", False)
            host = target if target.device.type == "cpu" else source
            self._copied(source, target.device.type, host, not blocking)
            if host is source:
                self._values.remember(target, source)
            elif (known := self.known(source)) is not None:
                target.copy_(known)
            return target
        return None

    def _copied(self, source: Tensor, to: str, host: Tensor, non_blocking: bool) -> None:
        way = f"copy {source.device.type} -> {to}"
        if not non_blocking:
            self._findings.sync(way)
        elif host.device.type == "cpu" and to == "cuda" and host.untyped_storage()._cdata not in self._pinned:
            self._findings.sync(f"{way} of memory that is not pinned")

    def _ask(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Answers that depend on data; None: it is no question."""
        if func is _aten._local_scalar_dense.default:
            self._findings.sync("a scalar is read")
            known, dtype = self.known(args[0]), args[0].dtype
            if known is not None:
                return known.item()
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func is _aten.nonzero.default:
            self._findings.sync("nonzero")
            # Weights are all there, masks mark nothing.
            rows = args[0].numel() if args[0].dtype.is_floating_point else 0
            return self._new((rows, args[0].dim()), torch.int64)
        if func is _aten.masked_select.default:
            self._findings.sync("a selection by a mask")
            source, mask = args[0], self.known(args[1])
            shape = torch.broadcast_shapes(source.shape, args[1].shape)
            out = self._new((0 if mask is None else int(mask.expand(shape).sum()),), source.dtype)
            if mask is not None and (values := self.known(source)) is not None:
                self._values.remember(out, values.masked_select(mask))
            return out
        if func in _INDEXING | _INDEX_WRITING:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks and func in _INDEXING:
                self._findings.sync("a boolean mask as index")
                return self._new((0, *args[0].shape[masks[0].dim() :]), args[0].dtype)
            if masks:
                if args[2].numel() != 1:  # one value is filled in without a look
                    self._findings.sync("a boolean mask as index")
                return args[0]
        return None

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with self.fake:
            out = torch.empty(shape, dtype=dtype, device="cuda:0")
        self._memory.see(out)
        return out

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], on_gpu: list[Any]) -> Any:
        try:
            if on_gpu:
                return func(*args, **kwargs)
            with self.fake:
                return func(*args, **kwargs)
        except RuntimeError as error:
            # What `torch.library.custom_op` defines says so without a class of its own.
            if not isinstance(error, _NO_FAKE_KERNEL) and "no fake impl registered" not in str(error):
                raise
            self._findings.problem(f"{func}: no fake kernel; taken to give tensors like its first argument")
            if not on_gpu:
                raise
            given = [self._stand_in(returned.type, on_gpu[0]) for returned in func._schema.returns]
            return given[0] if len(given) == 1 else tuple(given)

    def _stand_in(self, kind: Any, like: Tensor) -> Any:
        """For a result of this type in an operator's schema; None for what is neither tensor nor number."""
        if kind.kind() == "TensorType":
            return self._new(tuple(like.shape), like.dtype)
        if kind.kind() == "ListType":
            return [self._stand_in(kind.getElementType(), like)]
        return _NUMBERS.get(kind.kind())

    def _check_types(self, func: Any, tensors: list[Tensor]) -> None:
        found = {t.dtype for t in tensors if t.dtype.is_floating_point}
        if len(found) > 1:
            self._findings.problem(f"{func}: mixed types {', '.join(sorted(map(str, found)))}")

    def _account(self, func: Any, args: tuple[Any, ...], out: Any, on_gpu: list[Any]) -> None:
        outputs = [o for o in tensors_in(out) if isinstance(o, FakeTensor) and o.device.type == "cuda"]
        for output in outputs:
            self._memory.see(output)
        if func.is_view or not outputs:
            return
        if has_workspace(func):
            self._memory.passing(
                attention_workspace(
                    func, args, self._multiprocessors, torch.are_deterministic_algorithms_enabled()
                ),
                f"workspace of {func._schema.name}",
            )
        flops = flops_of(func, args, out, self.values)
        name = func._schema.name.partition("::")[2]
        nbytes = bytes_of(func, [t for t in on_gpu if t.device.type == "cuda"], outputs)
        if nbytes:
            self._work.add(self._findings.phase, Kernel(name, flops, nbytes))

    def _communicate(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], fake: bool
    ) -> Any:
        self._recorder.see(func, args)
        name = func._schema.name
        barrier = name.endswith("barrier")
        if not fake and not barrier:
            return func(*args, **kwargs)  # over a group of the host's
        if name in _STRICT:
            self._check_types(func, tensors)
        for tensor in [] if barrier else tensors:
            if tensor.device.type != "cuda":
                self._findings.problem(
                    f"{name}: a tensor on {tensor.device.type} beside others on the device"
                )
            if not tensor.is_contiguous():
                self._findings.problem(f"{name}: a tensor that is not contiguous")
        self._gather(name, args, tensors)
        self._works += 1
        work = FakeWork()
        work.seq_id = self._works
        self._recorder.knows_work(self._works)
        returned = [r.type.kind() for r in func._schema.returns]
        boxed = work.boxed()
        return boxed if len(returned) == 1 else (args[0], boxed)

    def _gather(self, name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        """What others send is what this rank sends, where that is known."""
        own = self.known(args[1]) if name == "c10d::_allgather_base_" else None
        if own is not None:
            gathered = args[0]
            times = gathered.numel() // own.numel()
            self._values.remember(gathered, own.flatten().repeat(times).view(gathered.shape))
            return
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                self._values.forget(tensor)
