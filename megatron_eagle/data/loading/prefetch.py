"""Work done ahead of its use, as far as memory allows."""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from threading import Condition, Thread
from typing import Generic, Protocol, TypeVar

# Where items hold next to nothing (on ranks that read no media), bytes are no limit.
MOST_AHEAD = 8


class Sized(Protocol):
    """What the limit counts."""

    @property
    def nbytes(self) -> int: ...


Draft = TypeVar("Draft", bound=Sized)
Item = TypeVar("Item")


class Prefetcher(Generic[Draft, Item]):
    """`prepare(position)`, then `finish` of the result, for each position in turn, in a background thread.

    `prepare` is cheap and makes a draft whose `nbytes` say what the item will hold once it is finished. Items
    that wait to be taken hold at most `limit` bytes together, or are one item, whatever it holds.
    """

    def __init__(
        self,
        prepare: Callable[[int], Draft],
        finish: Callable[[Draft], Item],
        positions: Iterable[int],
        *,
        limit: int,
    ):
        self._prepare, self._finish, self._positions, self._limit = prepare, finish, positions, limit
        self._ready: deque[tuple[Item, int] | BaseException] = deque()  # items and their bytes
        self._held = 0  # bytes of the items in `_ready`, and of the one that is being finished
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def take(self) -> Item:
        """The next item, waiting for it.

        Raises:
            BaseException: what making it raised; there is no item after that.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            ready = self._ready.popleft()
            if isinstance(ready, BaseException):
                raise ready
            item, nbytes = ready
            self._held -= nbytes
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
                draft = self._prepare(position)
                nbytes = draft.nbytes
                with self._changed:
                    self._changed.wait_for(partial(self._may_go_on, nbytes))
                    if self._closed:
                        return
                    self._held += nbytes
                self._put((self._finish(draft), nbytes))
        except BaseException as error:
            self._put(error)

    def _may_go_on(self, nbytes: int) -> bool:
        fits = self._held + nbytes <= self._limit and len(self._ready) < MOST_AHEAD
        return self._closed or fits or not self._ready

    def _put(self, ready: tuple[Item, int] | BaseException) -> None:
        with self._changed:
            self._ready.append(ready)
            self._changed.notify_all()
