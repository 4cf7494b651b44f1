"""cuDNN graphs of attention over ragged tensors, forward or backward; causal is bottom-right.

Letters: b segments, x the longest of them, np query heads, ng KV heads, d head size. Tensors are
packed, [tokens, heads, d]; a ragged offset says at which element each segment begins.
"""

from functools import lru_cache
from typing import Any

import torch


@lru_cache(maxsize=256)
def plan_graph(
    b: int,
    x_q: int,
    x_k: int,
    np: int,
    ng: int,
    d: int,
    scale: float,
    causal: bool,
    backward: bool,
    deterministic: bool,
    device: torch.device,
) -> tuple[Any, dict[str, Any], Any]:
    """-> the graph, built for this CUDA device, its tensors by name, and its handle."""
    import cudnn

    with torch.cuda.device(device):
        handle = cudnn.create_handle()
        options = {"handle": handle}
        graph, ports = describe_graph(b, x_q, x_k, np, ng, d, scale, causal, backward, deterministic, options)
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return graph, ports, handle


def describe_graph(
    b: int,
    x_q: int,
    x_k: int,
    np: int,
    ng: int,
    d: int,
    scale: float,
    causal: bool,
    backward: bool,
    deterministic: bool,
    options: dict[str, Any],
) -> tuple[Any, dict[str, Any]]:
    """-> the graph, not built, and its tensors by name. Needs no GPU; `options` are of cuDNN's graph."""
    import cudnn

    types = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=types.BFLOAT16,
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
        **options,
    )
    ports: dict[str, Any] = {}
    for name, size in (("at_q", b + 1), ("at_k", b + 1), ("at_stats", b + 1), ("rows_q", b), ("rows_k", b)):
        kind = types.INT64 if name.startswith("at") else types.INT32
        ports[name] = graph.tensor(dim=[size, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind, name=name)

    def ragged(name: str, tensor: Any = None) -> Any:
        x, heads, features = (x_k, ng, d) if name[-1] in "kv" else (x_q, np, 1 if name == "stats" else d)
        offset = ports["at_stats" if name == "stats" else "at_k" if name[-1] in "kv" else "at_q"]
        kind = types.FLOAT if name == "stats" else types.BFLOAT16
        dim, stride = [b, heads, x, features], [x * heads * features, features, heads * features, 1]
        if tensor is None:
            tensor = graph.tensor(dim=dim, stride=stride, data_type=kind, name=name)
        else:
            tensor.set_output(True).set_dim(dim).set_stride(stride).set_data_type(kind)
        tensor.set_ragged_offset(offset)
        ports[name] = tensor
        return tensor

    arguments = {
        "attn_scale": scale,
        "use_padding_mask": True,
        "seq_len_q": ports["rows_q"],
        "seq_len_kv": ports["rows_k"],
    }
    if causal:
        arguments["diagonal_alignment"] = cudnn.diagonal_alignment.BOTTOM_RIGHT
        arguments["diagonal_band_right_bound"] = 0
    q, k, v = (ragged(name) for name in "qkv")
    if backward:
        o, do, stats = (ragged(name) for name in ("o", "do", "stats"))
        grads = graph.sdpa_backward(
            q=q, k=k, v=v, o=o, dO=do, stats=stats, use_deterministic_algorithm=deterministic, **arguments
        )
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            ragged(name, grad)
    else:
        o, stats = graph.sdpa(q=q, k=k, v=v, generate_stats=True, **arguments)
        ragged("o", o)
        ragged("stats", stats)
    return graph, ports
