"""cuDNN's attention through nvidia-cudnn-frontend as an attention backend: ragged, bottom-right where causal.

A graph is planned per shape (`cudnn_graph.py`), so segments are filled up with empty ones and longest
lengths rounded up, both to a power of two: packs share a few dozen graphs.

For long documents it needs `torch.use_deterministic_algorithms(False)`: Transformer Engine's sources tell of
a deterministic ragged backward on sm_90 whose workspace takes some 128 bytes a pair of a query and a key.
"""

import torch
from torch import Tensor

from megatron_eagle.context_parallel.cudnn_graph import plan_graph
from megatron_eagle.context_parallel.layout import Segment
from megatron_eagle.context_parallel.varlen import empty_contiguous, fill_unseen, varlen_shape
from megatron_eagle.runtime.libraries import why_not_library


class CudnnAttention:
    """`AttentionBackend` by cuDNN 9.6 or later, bf16, sm_90 and up. Written, not yet run."""

    @staticmethod
    def why_not() -> str | None:
        """Why it cannot be used here, or None if it can."""
        if missing := why_not_library("cudnn"):
            return missing
        if torch.cuda.get_device_capability() < (9, 0):
            return "ragged tensors need compute capability 9.0"
        import cudnn

        try:
            version = cudnn.backend_version()
        except RuntimeError as error:
            return f"nvidia-cudnn-frontend does not work: {error}"
        return None if version >= 90600 else f"cuDNN is {version}: ragged statistics need 90600"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)  # [s, np]
        tensors = {"q": q, "k": k, "v": v, "o": torch.empty(q.shape, dtype=q.dtype, device=q.device)}
        _run(segments, scale, causal, tensors | {"stats": lse})
        fill_unseen(segments, tensors["o"], lse.t())
        return tensors["o"], lse.t()

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: tuple[Segment, ...],
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = empty_contiguous(q, k, v)
        tensors = {"q": q, "k": k, "v": v, "o": out, "do": grad_out, "stats": lse.t()}
        _run(segments, scale, causal, tensors | dict(zip(("dq", "dk", "dv"), grads, strict=True)))
        fill_unseen(segments, grads[0])
        return grads


def _run(segments: tuple[Segment, ...], scale: float, causal: bool, tensors: dict[str, torch.Tensor]) -> None:
    import cudnn

    q, k = tensors["q"], tensors["k"]
    shape = varlen_shape(segments, q.device)
    sizes = [1 << (n - 1).bit_length() for n in (len(segments), shape.max_q, shape.max_k)]
    heads = (q.shape[1], k.shape[1], q.shape[2])
    deterministic = torch.are_deterministic_algorithms_enabled()
    graph, ports, handle = plan_graph(*sizes, *heads, scale, causal, "do" in tensors, deterministic, q.device)
    cu_q, cu_k = (torch.cat([cu, cu[-1:].expand(sizes[0] + 1 - len(cu))]) for cu in shape[:2])
    given = {name: tensor.contiguous() for name, tensor in tensors.items()}  # outputs are already
    given |= {"rows_q": cu_q.diff(), "rows_k": cu_k.diff(), "at_stats": cu_q.long() * heads[0]}
    given |= {"at_q": cu_q.long() * heads[0] * heads[2], "at_k": cu_k.long() * heads[1] * heads[2]}
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=q.device)
    graph.execute({ports[name]: tensor for name, tensor in given.items()}, workspace, handle=handle)
