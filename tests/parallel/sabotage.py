"""Negative controls: the parity case with one collective left out. Each must be noticed."""

from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import cross_entropy

from megatron_eagle.context_parallel import attention, gather_kv, ulysses, vision_sharding
from megatron_eagle.model import eagle, inputs, layers
from megatron_eagle.training import optimizer
from tests.parallel.cases import Layout, run


def _own_chunk(output, tensor, group, async_op):
    """A reduce-scatter in which every rank keeps its own part and adds nothing of the others'."""
    output.copy_(tensor.chunk(group.size())[group.rank()])
    return _Done()


def _own_split(output, tensor, output_counts, input_counts, group, async_op):
    """An all-to-all in which every rank receives its own part and zeros from the others."""
    own = group.rank()
    output.zero_().split(output_counts)[own].copy_(tensor.split(input_counts)[own])
    return _Done()


class _Done:
    def wait(self):
        pass


def _lose_gradients(collective, instead):
    """Key and value gradients of the other ranks' queries are lost where `collective` returns them."""
    start_return = gather_kv.start_return

    def start(*args):
        with patch.object(dist, collective, instead):
            return start_return(*args)

    return patch.object(gather_kv, "start_return", start)


class _OneWayUlysses(ulysses.TokensToHeads):
    """Gradients of the heads that other ranks took are lost."""

    @staticmethod
    def backward(ctx, *grads):
        with patch.object(ulysses, "_exchange", lambda parts, group: parts):
            return ulysses.TokensToHeads.backward(ctx, *grads)


class _OneWayUlyssesOutput(ulysses.HeadsToTokens):
    """Output gradients of other ranks' tokens are lost."""

    @staticmethod
    def backward(ctx, grad):
        with patch.object(ulysses, "_exchange", lambda parts, group: parts):
            return ulysses.HeadsToTokens.backward(ctx, grad)


def _own_tiles(decoded, share):
    """The tiles to encode, of which only those that this rank decoded have pixels."""
    tiles = decoded.new_zeros((share.encoded_tiles, *decoded.shape[1:]))
    start = share.decoded_tiles.start - share.first_tile
    tiles[start : start + len(decoded)] = decoded
    return tiles


class _UnmarkedNorm(layers.RMSNorm):
    """Megatron no longer knows that this weight's gradient must be summed over tensor parallel ranks."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight.sequence_parallel = False


class _OneWayExchange(vision_sharding._Exchange):
    """Gradients of features that other ranks used are lost."""

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros((ctx.num_features, grad.shape[1])), None


class _TorchWithoutAllReduce:
    """torch for one module, with an all-reduce that leaves every rank what it had."""

    class distributed:
        ReduceOp = torch.distributed.ReduceOp

        @staticmethod
        def all_reduce(tensor, op=None, group=None):
            pass

    def __getattr__(self, name):
        return getattr(torch, name)


# What is left out -> (a layout of the table that must notice, the patch).
SABOTAGES = {
    "dK/dV, reduce-scatter": (
        "CP2, zigzag",
        lambda: _lose_gradients("reduce_scatter_tensor", _own_chunk),
    ),
    "dK/dV, all-to-all": (
        "CP4, balanced",
        lambda: _lose_gradients("all_to_all_single", _own_split),
    ),
    "Ulysses before attention, backward": (
        "Ulysses 2, balanced",
        lambda: patch.object(attention, "TokensToHeads", _OneWayUlysses),
    ),
    "Ulysses after attention, backward": (
        "Ulysses 2, balanced",
        lambda: patch.object(attention, "HeadsToTokens", _OneWayUlyssesOutput),
    ),
    "vision features, backward exchange": (
        "CP2, cp",
        lambda: patch.object(vision_sharding, "_Exchange", _OneWayExchange),
    ),
    "pixels that other ranks decoded": (
        "TP2, none",
        lambda: patch.object(inputs, "gather_tiles", _own_tiles),
    ),
    "vision features over tensor parallel ranks, backward": (
        "TP2+SP, none",
        lambda: patch.object(eagle, "copy_to_tensor_model_parallel_region", lambda features, group: features),
    ),
    "whole tower's gradients over tensor parallel ranks": (
        "TP2, cp_tp",
        lambda: patch.object(optimizer, "sum_tower_gradients", lambda gradients, group: None),
    ),
    "norm weights over tensor parallel ranks": (
        "TP2+SP, none",
        lambda: patch.object(layers, "RMSNorm", _UnmarkedNorm),
    ),
    "cross-entropy over tensor parallel ranks": (
        "TP2, none",
        lambda: patch.object(cross_entropy, "torch", _TorchWithoutAllReduce()),
    ),
    "gradients over data parallel ranks": (
        "DP2, none",
        lambda: patch.object(DistributedDataParallel, "finish_grad_sync", lambda self, **_: None),
    ),
}


def run_sabotaged(name: str, layout: Layout, config) -> dict:
    """`cases.run` with the collective `name` left out."""
    with SABOTAGES[name][1]():
        return run(layout, config)
