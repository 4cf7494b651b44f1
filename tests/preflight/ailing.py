"""`train.py preflight` on a node that has something: python -m tests.preflight.ailing FAULT ... -- ARGUMENTS

clock=60           its clock is so many seconds ahead
package=1.0        it has another version of numpy
elsewhere=FOLDER   what is written in a shared folder goes there: its file system is another one
read-only          it cannot write
stop=look          the process stands still while it looks at its node; stop=messages: between two messages
"""

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from megatron_eagle.commands.train import main
from megatron_eagle.errors import run_cli
from megatron_eagle.preflight import exchange, folders, node, nodes


def suffer(fault: str) -> None:
    """Bring it about."""
    kind, _, value = fault.partition("=")
    if kind == "clock":
        right = time.time
        nodes.time = type("Time", (), {"time": staticmethod(lambda: right() + float(value))})  # type: ignore[attr-defined]
    elif kind == "package":
        versions = node._versions
        node._versions = lambda gpus: versions(gpus) | {"numpy": value}
    elif kind == "elsewhere":
        own_file = folders.own_file
        folders.own_file = lambda folder, token, name: own_file(value, token, name)
    elif kind == "read-only":
        Path.write_text = _refuse  # type: ignore[assignment]
    elif fault == "stop=look":
        nodes.look_at_node = _stand_still
    elif fault == "stop=messages":
        exchange._all_to_all = _stand_still
    else:
        raise ValueError(fault)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def _stand_still(*_: Any, **__: Any) -> NoReturn:
    while True:
        time.sleep(1000)


def _start() -> Callable[[], int | None]:
    faults, arguments = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    for fault in faults:
        suffer(fault)
    return lambda: main(["preflight", *arguments])


if __name__ == "__main__":
    run_cli(_start())
