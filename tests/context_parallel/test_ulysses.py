"""Which heads Ulysses gives to which rank, and what it refuses."""

from functools import partial
from unittest.mock import patch

import pytest
import torch

from megatron_eagle.context_parallel import ulysses
from megatron_eagle.context_parallel.ulysses import divides_heads, share_heads
from megatron_eagle.runtime.parallel import ParallelConfig, model_parallel
from tests.parallel.harness import launch


@pytest.mark.parametrize(
    ("size", "queries", "keys", "expected"),
    [
        (2, 32, 8, [16, 16]),
        (8, 32, 8, [4] * 8),
        (16, 32, 8, [2] * 16),
        (4, 8, 2, [2] * 4),
        (8, 8, 2, [1] * 8),
        (8, 28, 4, [4, 3] * 4),
        (16, 28, 4, [2, 2, 2, 1] * 4),
        (28, 28, 4, [1] * 28),
    ],
)
def test_heads_are_shared_evenly_and_follow_their_kv_head(size, queries, keys, expected):
    assert divides_heads(size, queries, keys)
    shares = share_heads(size, queries, keys)
    assert [last - first for (first, last), _ in shares] == expected
    assert [head for (first, last), _ in shares for head in range(first, last)] == list(range(queries))
    for (first, last), (first_key, last_key) in shares:
        served = {head * keys // queries for head in range(first, last)}
        assert served == set(range(first_key, last_key))


@pytest.mark.parametrize(("size", "queries", "keys"), [(3, 28, 4), (6, 12, 4), (32, 28, 4), (16, 8, 2)])
def test_other_numbers_are_refused(size, queries, keys):
    assert not divides_heads(size, queries, keys)


TOKENS = 3


def there_and_back(queries: int, keys: int, size: int) -> list[torch.Tensor]:
    """On one rank: tensors of all its heads after both exchanges, and the gradients of k and v."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    q, k, v = (
        torch.randn(TOKENS, n, 2, generator=generator, requires_grad=True) for n in (queries, keys, keys)
    )
    with model_parallel(ParallelConfig(context_parallel_size=size, ulysses_parallel_size=size)) as mesh:
        group = mesh.groups.hcp[0]
        mine, own_keys, values = ulysses.TokensToHeads.apply(q, k, v, group)
        back = ulysses.HeadsToTokens.apply(mine, queries, keys, group)
        # Every query head of a rank counts its key once.
        served = mine.shape[1] / own_keys.shape[1]
        (back.square().sum() + served * (own_keys.sum() + 2 * values.sum())).backward()
    return [q.detach(), back.detach(), q.grad, k.grad, v.grad]


def lost_copies(*sizes: int) -> list[torch.Tensor]:
    first = lambda grads, copies: torch.cat(grads, dim=1)[:, ::copies]  # noqa: E731
    with patch.object(ulysses, "_sum_copies", first):
        return there_and_back(*sizes)


@pytest.mark.parametrize("run", [there_and_back, lost_copies])
@pytest.mark.parametrize(
    ("queries", "keys", "size"),
    [(14, 2, 4)]
    + [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((28, 4, 8), (8, 2, 8), (32, 8, 16))],
)
def test_exchanges_return_what_they_took_and_sum_copies(run, queries, keys, size):
    """The query heads of a KV head are on several ranks: its gradient is that of all of them."""
    for q, back, grad_q, grad_k, grad_v in launch(partial(run, queries, keys, size), size):
        assert torch.equal(back, q) and torch.equal(grad_q, 2 * q)
        whole = torch.full_like(grad_k, queries / keys)
        assert torch.equal(grad_k, whole) == torch.equal(grad_v, 2 * whole) == (run is there_and_back)
