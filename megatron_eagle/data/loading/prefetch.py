"""Work done ahead of its use, as far as memory allows."""

from collections import deque
from collections.abc import Callable, Iterable
from threading import Condition, Thread
from typing import Generic, Protocol, TypeVar

# Where items hold next to nothing (on ranks that read no media), bytes are no limit.
MOST_AHEAD = 8


class Sized(Protocol):
    """What the limit counts."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Prefetcher(Generic[T]):
    """`prepare(position)`, then `finish` of the result, for each position in turn, in a background thread.

    `prepare` is cheap and makes an item whose `nbytes` say what it will hold once it is finished. Items that
    wait to be taken hold at most `limit` bytes together, or are one item, whatever it holds.
    """

    def __init__(
        self,
        prepare: Callable[[int], T],
        finish: Callable[[T], None],
        positions: Iterable[int],
        *,
        limit: int,
    ):
        self._prepare, self._finish, self._positions, self._limit = prepare, finish, positions, limit
        self._ready: deque[T | BaseException] = deque()
        self._held = 0  # bytes of the items in `_ready`, and of the one that is being finished
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> T:
        """The next item, waiting for it. Raises what making it raised; there is no item after that."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            item = self._ready.popleft()
            if isinstance(item, BaseException):
                raise item
            self._held -= item.nbytes
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Make no further item. Waits for the one that is being made."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            for position in self._positions:
                item = self._prepare(position)
                with self._changed:
                    self._changed.wait_for(lambda item=item: self._closed or self._has_room(item))
                    if self._closed:
                        return
                    self._held += item.nbytes
                self._finish(item)
                self._put(item)
        except BaseException as error:
            self._put(error)

    def _has_room(self, item: T) -> bool:
        fits = self._held + item.nbytes <= self._limit and len(self._ready) < MOST_AHEAD
        return fits or not self._ready

    def _put(self, item: T | BaseException) -> None:
        with self._changed:
            self._ready.append(item)
            self._changed.notify_all()
