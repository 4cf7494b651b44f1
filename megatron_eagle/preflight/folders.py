"""Whether a folder is one for all nodes: what each of them writes there, the others must find.

A file system that is not mounted on a node is an empty folder of its own disk, into which a run writes
without a word. File systems of a network may show a file some seconds after it was written.
"""

import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from megatron_eagle.errors import UserError

# As long as NFS keeps what it knows of a folder (acdirmax: 60 s) no run could wait at every save.
SECONDS = 15.0


def own_file(folder: str, token: str, node: str) -> Path:
    """Where a node writes in this preflight."""
    return Path(folder, f".preflight-{token}-{node}")


def write_own(folder: str, token: str, node: str) -> None:
    """Write what the other nodes look for.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        own_file(folder, token, node).write_text(token)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}: mount it for writing, or name another folder"
        ) from None


def see_others(folder: str, token: str, nodes: Iterable[str], seconds: float = SECONDS) -> set[str]:
    """The nodes whose file is seen here, this one's included, within these seconds. Opened, and not only
    asked for: file systems of a network look at the server then."""
    missing, seen, end = set(nodes), set[str](), time.monotonic() + seconds
    while missing:
        here = {node for node in missing if _holds(own_file(folder, token, node), token)}
        missing -= here
        seen |= here
        if not missing or time.monotonic() > end:
            break
        time.sleep(0.2)
    return seen


def _holds(file: Path, token: str) -> bool:
    try:
        return file.read_text() == token
    except OSError:
        return False


def remove_own(folders: Collection[str], token: str, node: str) -> None:
    """Take away what was written."""
    for folder in folders:
        with suppress(OSError):  # who cannot write there has been told
            own_file(folder, token, node).unlink(missing_ok=True)
