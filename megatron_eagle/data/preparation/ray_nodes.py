"""Wait until all nodes of a Ray cluster are there: `python -m ... SECONDS NAME...`, with RAY_ADDRESS set.

Names are those that `ray start --node-name` gave.
"""

import logging
import os
import socket
import sys
import time
from collections.abc import Sequence

from megatron_eagle.errors import UserError, run_cli


def wait_for_nodes(names: Sequence[str], seconds: float) -> None:
    """Return when all are there.

    Raises:
        UserError: some are missing after `seconds`, which are named.
    """
    import ray

    end, missing = time.monotonic() + seconds, list(names)
    why, connected = "Ray's head does not answer", False
    while missing:
        try:
            if not connected:
                # Ray's own wait for a head that is not up yet lasts a minute.
                host, _, port = os.environ["RAY_ADDRESS"].rpartition(":")
                socket.create_connection((host, int(port)), timeout=5).close()
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
                connected = True
            there = {node["NodeName"] for node in ray.nodes() if node["Alive"]}
            missing = [name for name in names if name not in there]
            why = f"{len(there)} of {len(names)} nodes of Ray are there"
        except (OSError, RuntimeError) as error:
            why = f"Ray's head does not answer ({str(error).splitlines()[0]})"
        if missing and time.monotonic() > end:
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise UserError(f"{why} after {seconds:g} s; missing: {shown}")
        if missing:
            time.sleep(1)
    ray.shutdown()


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    seconds, *names = sys.argv[1:] if argv is None else argv
    wait_for_nodes(names, float(seconds))


if __name__ == "__main__":
    run_cli(main)
