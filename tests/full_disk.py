"""A full disk, for this process: nothing that is written to a file fits."""

import io
import resource
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def full_disk(limit: int = 0) -> Iterator[io.StringIO]:
    """No file grows beyond `limit` bytes meanwhile, as on a disk without space; what is printed is yielded.

    The system says "File too large" here where a disk says "No space left on device".
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    printed = io.StringIO()  # the tests' own output may go to a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            yield printed
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
