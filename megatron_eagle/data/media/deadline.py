"""A time limit for calls that may never come back: a file system that hangs, a decoder that waits."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

from megatron_eagle.problems import Problem

T = TypeVar("T")
TOO_LONG = "decoding takes too long"


def within_deadline(seconds: float | None, path: str, call: Callable[[], T]) -> T:
    """`call()`, or `Problem` if it takes longer than this (None: no limit).

    The call itself cannot be stopped: it goes on in a thread that nobody waits for, not even the end of the
    process.
    """
    if seconds is None:
        return call()
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="decode", daemon=True).start()
    try:
        return answer.result(seconds)
    except FutureTimeout:
        if answer.done():  # the call's own error of that name
            raise
        raise Problem(TOO_LONG, f"{path}: more than {seconds:g} s") from None
