"""The machine that is not there, as Python sees it: `torch.cuda`, process groups and Triton's launches."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_eagle.rehearsal.cuda_answers import cuda_answers
from megatron_eagle.rehearsal.fake_gpu import FakeGpu
from megatron_eagle.rehearsal.findings import Findings
from megatron_eagle.rehearsal.gpu_types import GpuType
from megatron_eagle.rehearsal.memory import Memory
from megatron_eagle.rehearsal.messages import Recorder
from megatron_eagle.rehearsal.patches import Patch, applied
from megatron_eagle.rehearsal.work import Kernel, Work, size_of

_TYPE_NAMES = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.float16: "Half"}


class FakeMachine:
    """One GPU of a type, as one rank of a job has it."""

    def __init__(self, gpu: GpuType) -> None:
        self.gpu, self.findings, self.memory, self.work, self.recorder = (
            gpu,
            Findings(),
            Memory(),
            Work(),
            Recorder(),
        )
        self.mode = FakeGpu(self.findings, self.memory, self.work, self.recorder, gpu.multiprocessors)

    def begin(self, phase: str) -> None:
        """Of the step, from here on."""
        self.findings.phase = self.recorder.phase = phase
        self.memory.begin(phase)

    @contextmanager
    def rank(self, rank: int, world_size: int) -> Iterator[None]:
        """This process is `rank` of a job, with the machine around it; once in a process."""
        with ExitStack() as stack:
            stack.enter_context(applied(self._patches()))
            lift = torch._C._only_lift_cpu_tensors()
            torch._C._set_only_lift_cpu_tensors(
                True
            )  # torch.tensor(..., device="cuda"): made here, then moved
            stack.callback(torch._C._set_only_lift_cpu_tensors, lift)
            stack.enter_context(applied(_fake_groups()))
            stack.enter_context(applied(self.recorder.patches()))
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
            stack.callback(dist.destroy_process_group)
            stack.enter_context(self.mode)
            yield

    def _patches(self) -> list[Patch]:
        recorder, mode, adam = self.recorder, self.mode, sys.modules["torch.optim.adam"]

        def wait(work: FakeWork, *_: Any) -> bool:
            recorder.note_wait(work.seq_id)
            return True

        return [
            *cuda_answers(self.gpu, self.findings, self.memory),
            (FakeWork, "wait", wait),
            (FakeTensorMode, "avoid_device_init", property(lambda _: True)),  # it would ask for a device
            (torch.Tensor, "pin_memory", lambda tensor, *_: mode.pin(tensor)),
            (torch.Tensor, "type", _tensor_type),
            (torch.Tensor, "record_stream", lambda *_: None),
            (FakeTensor, "tolist", _lister(mode, self.findings)),
            (torch.nn.Module, "to", _module_to),
            # torch takes the fast form for its own types of parameters only.
            (adam, "_default_to_fused_or_foreach", lambda *_, **__: (False, True)),
            (torch.nn.functional, "scaled_dot_product_attention", _attention),
            *_triton(self.findings, self.work),
        ]


# ---- tensors and modules

_type = torch.Tensor.type


def _tensor_type(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Megatron groups parameters by the name of their CUDA type."""
    if isinstance(tensor, FakeTensor) and not args and not kwargs and tensor.dtype in _TYPE_NAMES:
        return f"torch.cuda.{_TYPE_NAMES[tensor.dtype]}Tensor"
    return _type(tensor, *args, **kwargs)


def _lister(mode: FakeGpu, findings: Findings) -> Callable[[Tensor], Any]:
    """Lists are read at once on a GPU; a fake tensor would be asked for one number after the other."""

    def tolist(tensor: Tensor) -> Any:
        findings.sync("a list is read")
        known = mode.known(tensor)
        return torch.ones(tensor.shape, dtype=tensor.dtype).tolist() if known is None else known.tolist()

    return tolist


def _module_to(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """`Module.to` of a device, which torch cannot do from a real to a fake parameter: new ones, with what
    Megatron has written on them."""
    for part in module.modules():
        for name, old in list(part._parameters.items()):
            if old is not None and old.device.type != torch.device(device).type:
                new = torch.nn.Parameter(old.detach().to(device, non_blocking=True), old.requires_grad)
                new.__dict__.update({k: v for k, v in old.__dict__.items() if k not in new.__dict__})
                part._parameters[name] = new
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = buffer.to(device, non_blocking=True)
    return module


_eager_attention = torch.nn.functional.scaled_dot_product_attention


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The kernel that a GPU takes for these: torch would choose by the real device."""
    plain = not args and not (kwargs.keys() - {"scale"}) and query.dtype in (torch.bfloat16, torch.float16)
    if not (isinstance(query, FakeTensor) and plain):
        return _eager_attention(query, key, value, *args, **kwargs)
    head = query.shape[-1]
    padding = -head % 8  # torch fills heads up to a multiple of 8
    if padding:
        query, key, value = (torch.nn.functional.pad(x, (0, padding)) for x in (query, key, value))
    scale = kwargs.get("scale") or head**-0.5
    out = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, False, False, scale=scale
    )
    attended: Tensor = out[0][..., :head]
    return attended


# ---- process groups


def _fake_groups() -> list[Patch]:
    """Groups that no other process is in: a collective returns at once, an object is everyone's.

    Wrapped, so that the recorder finds torch's signatures.
    """
    new_group = dist.new_group

    def new_fake_group(ranks: Sequence[int] | None = None, *_: Any, **options: Any) -> Any:
        kept = {k: v for k, v in options.items() if k in ("use_local_synchronization", "group_desc")}
        return new_group(ranks, backend="fake", **kept)

    @wraps(dist.all_gather_object)
    def all_gather_object(out: list[Any], value: Any, *_: Any, **__: Any) -> None:
        out[:] = [value] * len(out)

    @wraps(dist.gather_object)
    def gather_object(value: Any, out: list[Any] | None = None, *_: Any, **__: Any) -> None:
        if out is not None:
            out[:] = [value] * len(out)

    @wraps(dist.broadcast_object_list)
    def broadcast_object_list(*_: Any, **__: Any) -> None:
        pass

    return [
        (dist, "new_group", new_fake_group),
        (dist, "all_gather_object", all_gather_object),
        (dist, "gather_object", gather_object),
        (dist, "broadcast_object_list", broadcast_object_list),
    ]


# ---- Triton


def _triton(findings: Findings, work: Work) -> list[Patch]:
    """Kernels are not run: their arguments are looked at."""
    from eagle_kernels.dispatch import triton

    if triton is None:
        return []

    def launcher(kernel: Any, _grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            name = kernel.fn.__name__
            named = [*zip(kernel.arg_names, args, strict=False), *kwargs.items()]
            tensors = [(argument, value) for argument, value in named if isinstance(value, Tensor)]
            for argument, tensor in tensors:
                if tensor.device.type != "cuda":
                    findings.problem(f"Triton kernel {name}: {argument} is on {tensor.device.type}")
                if tensor.numel() and tensor.dim() and tensor.stride(-1) != 1:
                    findings.problem(f"Triton kernel {name}: {argument} has strides {tensor.stride()}")
            findings.launches[name] += 1
            work.add(findings.phase, Kernel(name, 0.0, size_of([tensor for _, tensor in tensors])))

        return launch

    return [(triton.runtime.jit.JITFunction, "__getitem__", launcher)]
