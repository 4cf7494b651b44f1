"""Run a function on several gloo ranks of one machine and collect what each returns.

Ranks are forked from a server process that has imported torch and Megatron once (about six seconds),
so that a run of eight ranks costs about as much as its work. Each rank lives in the Megatron-on-CPU
context, with a file store for rendezvous: no ports.
"""

import io
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

PRELOAD = ["megatron_eagle.model.inputs", "megatron_eagle.training.train"]


def _rank_main(
    connection: Connection, function: Callable, rank: int, world_size: int, store: str, args: tuple
) -> None:
    from megatron_eagle.runtime.device import Device

    warnings.simplefilter("ignore")  # Megatron's and torch's deprecations, once a rank
    torch.set_num_threads(1)
    device = Device("cpu")
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        with device.context():
            _send(connection, True, function(*args))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        _send(connection, False, traceback.format_exc())
        os._exit(1)


def _send(connection: Connection, succeeded: bool, value: Any) -> None:
    # By value: torch's own pickling would share memory that ends with the rank.
    buffer = io.BytesIO()
    torch.save((succeeded, value), buffer)
    connection.send_bytes(buffer.getvalue())


def launch(function: Callable, world_size: int, *args: Any, timeout: float = 180) -> list[Any]:
    """`function(*args)` on `world_size` ranks -> their results, rank 0 first.

    Args:
        function: importable by name, with picklable arguments; returns plain values and
            tensors, and finds its place through torch.distributed.
    Raises:
        RuntimeError: a rank failed (with its traceback) or the timeout passed; no rank is left behind.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_rank_main,
                args=(there, function, rank, world_size, str(Path(folder, "store")), args),
                daemon=False,
            )
            process.start()
            there.close()
            ranks.append((process, here))
        try:
            return _collect(ranks, timeout)
        finally:
            for process, _ in ranks:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(ranks: list, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        pending = {connection: rank for rank, (_, connection) in enumerate(ranks) if rank not in results}
        ready = wait(list(pending), timeout=timeout)
        if not ready:
            _kill(ranks)
            raise RuntimeError(f"ranks {sorted(pending.values())} gave no result within {timeout} s")
        for connection in ready:
            rank = pending[connection]
            try:
                received = io.BytesIO(connection.recv_bytes())
                succeeded, value = torch.load(received, weights_only=True)
            except EOFError:
                succeeded, value = False, "the process ended without a result"
            if not succeeded:
                _kill(ranks)
                raise RuntimeError(f"rank {rank} of {len(ranks)} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(ranks))]


def _kill(ranks: list) -> None:
    for process, _ in ranks:
        process.kill()
