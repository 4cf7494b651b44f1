"""Negative controls: the parity case with one collective left out. Each must be noticed."""

from unittest.mock import patch

from megatron.core.distributed import DistributedDataParallel

from megatron_eagle.context_parallel import gather_kv
from megatron_eagle.model import eagle as eagle_module
from megatron_eagle.model import specs
from tests.parallel.cases import Layout, run


def _keep_own_tokens(x, layout, group):
    """Key and value gradients of the other ranks' queries are lost."""
    return x[layout.token_index(group.rank())]


def _slice_without_gather(hidden, group):
    """Backward gives each tensor parallel rank the gradient of its own slice only."""
    return hidden.chunk(group.size())[group.rank()].contiguous()


class _UnmarkedNorm(specs.RMSNorm):
    """Megatron no longer knows that this weight's gradient must be summed over tensor parallel ranks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight.sequence_parallel = False


SABOTAGES = {
    "dK/dV reduce-scatter": lambda: patch.object(gather_kv, "reduce_scatter_sequence", _keep_own_tokens),
    "sequence parallel scatter, backward": lambda: patch.object(
        eagle_module, "scatter_to_sequence_parallel_region", _slice_without_gather
    ),
    "norm weights over tensor parallel ranks": lambda: patch.object(specs, "RMSNorm", _UnmarkedNorm),
    "gradients over data parallel ranks": lambda: patch.object(
        DistributedDataParallel, "finish_grad_sync", lambda self, **_: None
    ),
}


def run_sabotaged(name: str, layout: Layout, eagle) -> dict:
    """`cases.run` with the collective `name` left out."""
    with SABOTAGES[name]():
        return run(layout, eagle)
