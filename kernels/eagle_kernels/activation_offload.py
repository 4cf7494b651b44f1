"""Checkpointed layers whose inputs wait for backward in host memory, and whose attention is not run again.

A layer keeps its input and what its core attention computed: the output and the log-sum-exp. Both go to the
host while the next layer runs; backward brings them back one layer ahead, and runs the layer again around an
attention that gets its results handed in (`KeptResults`) and goes straight to its own backward.

Host memory is one pinned slab of equal slots (torch rounds pinned memory up to a power of two). Copies run
on two streams of their own, one each way. With s tokens, h features, q features and n heads of all queries
and elements of b bytes, a layer moves s (h b + q b + 4 n) bytes each way, and the device holds at most two
layers' share besides those that stay: one on its way and one in use. On a CPU the copies are plain ones.

`torch.save_on_cpu` would also move the weights, and copy on the stream that computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes between the starts of tensors in a slot


class KeptResults:
    """Results that a layer computes once: kept in its first run, given back in the run of backward."""

    def __init__(self, results: tuple[Tensor, ...] | None = None) -> None:
        self.results, self._asked = results, False

    def once(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`compute()`, or what it gave in the first run. One call in a run of the layer."""
        if self._asked:
            raise RuntimeError("activation_offload: a layer keeps the results of one operation only")
        self._asked = True
        if self.results is None:
            self.results = compute()
        return self.results


class HostStore:
    """Where the layers of a rank offload tensors to: a slab of host memory, made when the first come.

    `slots`, to be set before, is how many layers' tensors are offloaded at one time. More, or larger ones,
    get a new slab: a number that is too small costs memory and no failure.
    """

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self._slot_bytes = 0
        self._free: list[Tensor] = []
        self._streams: tuple[Any, Any] | None = None
        self._copying: tuple[Any, Sequence[Tensor]] | None = None

    def offload(self, tensors: Sequence[Tensor]) -> Offloaded:
        """Begin to copy `tensors` to the host; they may not be written to any more."""
        self.settle()
        tensors = [tensor.contiguous() for tensor in tensors]
        offloaded = Offloaded(self, tensors)
        event = _copy(offloaded.hosts, tensors, self._stream(tensors[0].device, 0))
        if event is not None:
            self._copying = event, tensors
        return offloaded

    def settle(self) -> None:
        """Free the tensors that were offloaded last: what is computed from here on may take their memory."""
        if self._copying is not None:
            torch.cuda.current_stream().wait_event(self._copying[0])
            self._copying = None

    def _take(self, size: int, pinned: bool) -> Tensor:
        """A slot of at least `size` bytes, uint8."""
        if not self._free or self._slot_bytes < size:
            try:
                slab = torch.empty(self.slots, size, dtype=torch.uint8, pin_memory=pinned)
            except RuntimeError as error:
                raise MemoryError(
                    f"activation_offload: {self.slots * size / 1e9:.1f} GB of host memory are not to be had: "
                    "let more layers stay on the device (recompute.offload_keep_last)"
                ) from error
            self._slot_bytes, self._free = size, list(slab.unbind())
        return self._free.pop()

    def _give_back(self, slot: Tensor) -> None:
        if slot.numel() == self._slot_bytes:  # others are of an older slab, which goes with them
            self._free.append(slot)

    def _stream(self, device: torch.device, way: int) -> Any:
        """The copy stream to the host (0) or back (1); None on a CPU."""
        if device.type != "cuda":
            return None
        if self._streams is None:
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams[way]


class Offloaded:
    """Tensors in a slot of a `HostStore`."""

    def __init__(self, store: HostStore, tensors: Sequence[Tensor]) -> None:
        ends = [0]
        for tensor in tensors:
            ends.append(ends[-1] + -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT)
        self._store, self._device = store, tensors[0].device
        self._slot = store._take(ends[-1], pinned=tensors[0].is_cuda)
        self.hosts = [
            self._slot[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(ends, tensors, strict=False)
        ]
        self._returned: list[Tensor] | None = None

    def prefetch(self) -> None:
        """Begin to copy them to their device, if that has not begun."""
        if self._returned is None:
            self._returned = [torch.empty_like(host, device=self._device) for host in self.hosts]
            self._event = _copy(self._returned, self.hosts, self._store._stream(self._device, 1))

    def take(self) -> list[Tensor]:
        """The tensors on their device, for what is computed from here on; once."""
        self.prefetch()
        assert self._returned is not None, "prefetch begins it"
        if self._event is not None:
            # Also keeps the slot's next tensors behind: their copy waits for what is computed up to then.
            torch.cuda.current_stream().wait_event(self._event)
        returned, self._returned = self._returned, None
        self._store._give_back(self._slot)
        return returned


class _OnDevice:
    """`Offloaded` for tensors that stay on their device."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)

    def prefetch(self) -> None:
        pass

    def take(self) -> list[Tensor]:
        tensors, self._tensors = self._tensors, []
        return tensors


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor], stream: Any) -> Any:
    """Copy on `stream` what is computed up to here -> the event of its end; without a stream, at once."""
    if stream is None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
        return None
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        return stream.record_event()


def random_states() -> tuple[Tensor, ...]:
    """torch's random states, of the CPU and of the current CUDA device."""
    return torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def set_random_states(states: tuple[Tensor, ...]) -> None:
    """Set what `random_states` gave."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def offloaded_layer(
    layer: Callable[[Tensor, KeptResults], Tensor],
    x: Tensor,
    store: HostStore,
    *,
    stays: bool = False,
    random: tuple[Callable[[], Any], Callable[[Any], None]] = (random_states, set_random_states),
) -> Tensor:
    """`layer(x, replay)`, run again in backward from tensors that waited on the host.

    Layers that follow each other prefetch each other's tensors: backward of one starts the copies of the
    one before it.

    Args:
        layer: from x to one tensor; may hand one operation to its replay. Its parameters get their gradients
            as leaves, also where x asks for none (behind frozen parts).
        x: any shape, not written to afterwards.
        stays: keep the tensors on the device: for the last layers, whose backward comes first.
        random: gives and sets the random states that the layer draws from.

    Raises:
        MemoryError: the host has too little.
        RuntimeError: in backward, if it ran before, or under `torch.autograd.grad`.
    """
    if not torch.is_grad_enabled():
        return layer(x, KeptResults())
    if not x.requires_grad:
        # Without this the layer's parameters would have no part in the graph.
        x = x.detach().requires_grad_()
    y: Tensor = _OffloadedLayer.apply(x, layer, store, stays, random)
    return y


class _OffloadedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: Callable[[Tensor, KeptResults], Tensor],
        store: HostStore,
        stays: bool,
        random: tuple[Callable[[], Any], Callable[[Any], None]],
    ) -> Tensor:
        get_states, ctx.set_states = random
        ctx.get_states, ctx.states, ctx.layer = get_states, get_states(), layer
        replay = KeptResults()
        y = layer(x.detach(), replay)
        kept = (x.detach(), *(replay.results or ()))
        if stays:
            store.settle()
        ctx.offloaded = _OnDevice(kept) if stays else store.offload(kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError("activation_offload: torch.autograd.grad is not possible here; use backward")
        if ctx.offloaded is None:
            raise RuntimeError("activation_offload: backward ran before; what the layer kept is gone")
        x, *results = ctx.offloaded.take()
        ctx.offloaded = None
        for node, _ in ctx.next_functions:
            if isinstance(before := getattr(node, "offloaded", None), Offloaded):
                before.prefetch()
        x = x.requires_grad_()
        now = ctx.get_states()
        ctx.set_states(ctx.states)
        try:
            with torch.enable_grad():
                y = ctx.layer(x, KeptResults(tuple(results) or None))
        finally:
            ctx.set_states(now)
        torch.autograd.backward(y, grad)
        return x.grad, None, None, None, None
