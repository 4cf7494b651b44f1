"""What is known of small index tensors on a GPU that is not there."""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_eagle.rehearsal.values import Values, even_choice, tensors_in


class Follower(TorchDispatchMode):
    """As `FakeGpu` does it."""

    def __init__(self, values: Values) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values, self.fake = values, FakeTensorMode()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = any(isinstance(each, FakeTensor) for each in tensors_in((args, kwargs)))
        with nullcontext() if given else self.fake:
            out = func(*args, **(kwargs or {}))
        self.values.follow(func, args, kwargs or {}, out)
        return out


def known(values: Values, tensor: Tensor) -> list[Any] | None:
    found = values.of(tensor)
    return None if found is None else found.tolist()


@pytest.mark.parametrize(("rows", "k", "experts"), [(6, 2, 4), (5, 3, 8), (3, 1, 8)])
def test_choices_are_even(rows: int, k: int, experts: int) -> None:
    choice = even_choice(rows, k, experts)
    assert all(len(set(row)) == k for row in choice.tolist())
    counts = Counter(choice.flatten().tolist())
    assert sum(counts.values()) == rows * k
    assert max(counts.values()) - min(counts[expert] for expert in range(experts)) <= 1


def test_who_gets_how_many_rows() -> None:
    """As a dispatcher counts them: 5 rows, two of four experts for each, two ranks."""
    values = Values()
    with Follower(values):
        scores = torch.rand(5, 4)
        which = scores.topk(2, dim=-1)[1]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, which, True)
        counts = chosen.sum(dim=0).long()
        splits = counts.reshape(2, 2).sum(dim=1)
        rows = torch.arange(5).unsqueeze(0).expand(4, -1)
        weights = chosen.float()
    assert known(values, counts) == [3, 3, 2, 2]
    assert known(values, splits) == [6, 4]
    assert known(values, rows[:, 1:3]) == [[1, 2]] * 4
    assert known(values, scores) is known(values, weights) is None


def test_what_is_written_into() -> None:
    values = Values()
    with Follower(values):
        numbers, unknown = torch.zeros(4, dtype=torch.int64), torch.empty(2, dtype=torch.int64)
        numbers[1:3].fill_(7)
        numbers.add_(1)
        total = unknown + numbers[:2]
    assert known(values, numbers) == [1, 8, 8, 1]
    assert known(values, unknown) is known(values, total) is None
    with Follower(values):
        part = numbers[2:]
        part.copy_(unknown)
    assert known(values, numbers) is known(values, part) is None
    with Follower(values):
        part.fill_(1)
    assert known(values, part) is None, "what lies beside it is not known"
