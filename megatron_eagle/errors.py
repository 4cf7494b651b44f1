"""A user's mistake is one clear line (what, where, what to do) and a non-zero exit, never a traceback."""

import errno
import os
import sys
from collections.abc import Callable

# No space, quota, a file that may not grow further.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Bad input, configuration or environment; the message says what is wrong, where, and what to do."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a tool's `main` and exit: its return value (None = 0), 2 on `UserError` or a full disk, 130 on
    Ctrl-C."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `tool | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; make room and start again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
