"""Work ahead of its use: in order, bounded by bytes, one item at least."""

import itertools
import time
from dataclasses import dataclass

import pytest

from megatron_eagle.data.loading.prefetch import MOST_AHEAD, Prefetcher


@dataclass
class Item:
    number: int
    nbytes: int


class Worker:
    """Makes items of the given sizes and remembers which it has finished."""

    def __init__(self, sizes, limit: int, broken: int | None = None):
        self.sizes, self.broken, self.finished = sizes, broken, []
        self.prefetcher = Prefetcher(self.prepare, self.finish, itertools.count(), limit=limit)

    def prepare(self, number: int) -> Item:
        if number == self.broken:
            raise ValueError(f"item {number}")
        return Item(number, self.sizes(number))

    def finish(self, item: Item) -> Item:
        self.finished.append(item.number)
        return item

    def settled(self) -> int:
        """How many are finished once nothing moves any more."""
        count = -1
        while count != len(self.finished):
            count = len(self.finished)
            time.sleep(0.05)
        return count


@pytest.mark.parametrize(
    ("size", "limit", "ahead"),
    [(10, 35, 3), (10, 30, 3), (10, 5, 1), (10, 0, 1), (0, 100, MOST_AHEAD), (1, 10**9, MOST_AHEAD)],
)
def test_how_far_ahead(size, limit, ahead):
    worker = Worker(lambda _: size, limit)
    for taken in range(4):
        assert worker.settled() == taken + ahead
        assert worker.prefetcher.take().number == taken
    worker.prefetcher.close()


def test_a_large_item_waits_for_room():
    worker = Worker(lambda number: 90 if number == 2 else 10, 100)
    assert worker.settled() == 2
    worker.prefetcher.take()
    assert worker.settled() == 3
    worker.prefetcher.close()


def test_an_error_comes_in_its_place():
    worker = Worker(lambda _: 1, 100, broken=2)
    assert [worker.prefetcher.take().number for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        worker.prefetcher.take()
    worker.prefetcher.close()
    assert not worker.prefetcher._thread.is_alive()
