"""Run Megatron-Core (0.16.1 to 0.19.2) on CPU with gloo. The only file that patches torch or Megatron.

Megatron allocates with `device="cuda"`, moves tensors with `.cuda()` and keeps its random states on
the GPU. `megatron_on_cpu()` redirects exactly those calls while it is entered, and restores
everything when it is left. It is thread-local (a torch function mode) and refuses to act where CUDA
exists. Enter it around model construction, training steps and checkpointing.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")

# Calls that take a `device=` and make a tensor.
_FACTORIES = {
    torch.tensor,
    torch.as_tensor,
    torch.arange,
    torch.empty,
    torch.empty_like,
    torch.full,
    torch.ones,
    torch.ones_like,
    torch.zeros,
    torch.zeros_like,
}

# Megatron groups gradient buffers by the CUDA type name.
_CUDA_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


def _names_cuda(value: object) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


def _gather_parts(
    equal: Callable[..., Any], parts: list[Tensor], own: Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """torch's `all_gather`, also of parts of different lengths, as experts exchange them: gloo takes `equal`
    ones alone."""
    if len({part.shape for part in parts}) == 1:
        return equal(parts, own, group, async_op)
    parts[torch.distributed.get_rank(group)].copy_(own)
    for place, part in enumerate(parts):
        torch.distributed.broadcast(part, group=group, group_src=place)
    return None


def _reduce_scatter_parts(
    equal: Callable[..., Any],
    own: Tensor,
    parts: list[Tensor],
    op: Any = torch.distributed.ReduceOp.SUM,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    """torch's `reduce_scatter`, as `_gather_parts`."""
    if len({part.shape for part in parts}) == 1:
        return equal(own, parts, op, group, async_op)
    for place, part in enumerate(parts):
        reduced = part.clone()
        torch.distributed.reduce(reduced, op=op, group=group, group_dst=place)
        if place == torch.distributed.get_rank(group):
            own.copy_(reduced)
    return None


class _CudaToCpu(TorchFunctionMode):
    """Rewrites requests for CUDA memory into requests for host memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return _CUDA_TYPE_NAMES.get(name, name)
        if func in _FACTORIES:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
        elif func is torch.Tensor.to:
            args = tuple(_CPU if _names_cuda(a) else a for a in args)
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
        return func(*args, **kwargs)


class _CpuRngTracker:
    """Megatron's named random states (`CudaRNGStatesTracker`'s interface) over the CPU generator."""

    use_cudagraphable_rng = False
    is_inference_rng_tracker = False

    def __init__(self) -> None:
        self.reset()

    def is_initialized(self) -> bool:
        return bool(self.states_)

    def reset(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def get_states(self) -> dict[str, torch.Tensor]:
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        if name in self.states_ or seed in self.seeds_:
            raise ValueError(f"random state {name!r} or seed {seed} was added before")
        self.seeds_.add(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.states_[name] = torch.get_rng_state()

    @contextlib.contextmanager
    def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()


class _NullStream:
    """Stands for a CUDA stream: on the host everything is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: object = None) -> "_NullStream":
        return self

    def synchronize(self) -> None:
        pass

    def wait(self, stream: object = None) -> None:
        pass


def _patches() -> list[tuple[object, str, object]]:
    """(object, attribute, replacement) for calls that are not dispatched through torch functions."""
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    def current_stream(device: object = None) -> _NullStream:
        return _NullStream()

    return [
        (torch.cuda, "current_device", lambda: _CPU),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "Stream", _NullStream),
        (torch.cuda, "current_stream", current_stream),
        (torch.cuda, "default_stream", current_stream),
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", lambda device=None: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda state, device=None: None),
        (
            megatron_random,
            "_get_cuda_rng_state",
            lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
        ),
        (
            megatron_random,
            "_set_cuda_rng_state",
            lambda state, device=-1, graph_safe=False: torch.set_rng_state(state),
        ),
        (megatron_random, "_CUDA_RNG_STATE_TRACKER", _CpuRngTracker()),
        (megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True),
        (token_dispatcher, "maybe_move_tensor_to_cpu", _to_host),
        (torch.distributed, "all_gather", partial(_gather_parts, torch.distributed.all_gather)),
        (
            torch.distributed,
            "reduce_scatter",
            partial(_reduce_scatter_parts, torch.distributed.reduce_scatter),
        ),
    ]


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Of how many tokens go where. Megatron leaves a host's tensor as it is also where it asks for numpy, and
    gloo takes no tensors for sizes."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Context in which Megatron-Core builds, steps and checkpoints on the CPU.

    Raises:
        RuntimeError: where CUDA is available; there Megatron must run on the GPU.
    """
    if torch.cuda.is_available():
        raise RuntimeError("megatron_on_cpu() is for machines without CUDA")
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in _patches():
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        stack.enter_context(_CudaToCpu())
        yield


def name_missing_router_product() -> None:
    """Let Megatron's router of experts find that Transformer Engine's product is missing. Safe to call twice.

    Only acts where that is not installed, on a CPU or a GPU: Megatron 0.16.1 asks for a name which it has not
    imported then (0.19.2 has it as None).
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def use_norm_without_waiting() -> None:
    """Let Megatron's gradient norm stay on the device until it is whole. Safe to call twice.

    Only acts where neither TransformerEngine nor Apex is installed: Megatron 0.16.1 then falls back to a norm
    that reads every parameter's from the device, one after the other, in each step.
    """
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm


def _l2_norm(_chunk: int, _overflow: Tensor, lists: list[list[Tensor]], _each: bool) -> tuple[Tensor, None]:
    """Of all tensors of the lists together, fp32 [1]; as Apex's function of that name."""
    norms = [norm for tensors in lists for norm in torch._foreach_norm(tensors)]
    return torch.linalg.vector_norm(torch.stack(norms)).view(1), None


def fix_torch_adam_in_distributed_optimizer() -> None:
    """Let Megatron's distributed optimizer save and load `torch.optim.AdamW` state. Safe to call twice.

    Only acts where neither TransformerEngine nor Apex is installed, on a CPU or a GPU: Megatron then
    falls back to torch's Adam, whose state differs from the fused ones in ways its checkpointing overlooks:

    * `state_dict` needs the state before the first step, and that a rank owns at least one element;
    * `step` is a tensor per parameter, looked up as if it were a moment (KeyError when loading);
    * loading gives **one** `step` tensor to all parameters, which each of them then increments: the bias
      correction would be silently wrong from the second parameter on;
    * in fp32 the main parameters are views of leaves, which may only be written without autograd.
    """
    from megatron.core.optimizer import distrib_optimizer

    optimizer_class = distrib_optimizer.DistributedOptimizer
    if distrib_optimizer.HAVE_APEX_OR_TE or hasattr(optimizer_class, "_torch_adam_is_fixed"):
        return
    original_state_dict = optimizer_class.state_dict
    original_load_state_dict = optimizer_class.load_state_dict
    original_get_states = optimizer_class._get_main_param_and_optimizer_states

    def state_dict(self: Any) -> Any:
        adam = self.optimizer
        for parameter in (p for group in adam.param_groups for p in group["params"]):
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        if adam.state:
            return original_state_dict(self)
        # This rank owns no element (frozen parameters, or fewer elements than ranks): no step to read.
        groups = [{k: v for k, v in group.items() if k != "params"} for group in adam.param_groups]
        return {"optimizer": {"param_groups": [{**group, "step": 0.0} for group in groups]}}

    def load_state_dict(self: Any, state_dict: Any) -> None:
        original_load_state_dict(self, state_dict)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def get_states(self: Any, model_param: Tensor) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = original_get_states(self, model_param)
        tensors.pop("step", None)
        return tensors

    @torch.no_grad()
    def set_states(self: Any, model_param: Tensor, tensors: Mapping[str, Tensor]) -> None:
        for name, target in get_states(self, model_param).items():
            target.copy_(tensors[name])

    optimizer_class.state_dict = state_dict
    optimizer_class.load_state_dict = load_state_dict
    optimizer_class._get_main_param_and_optimizer_states = get_states
    optimizer_class._set_main_param_and_optimizer_states = set_states
    optimizer_class._torch_adam_is_fixed = True
