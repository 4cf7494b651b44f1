"""Exports of a run as it goes on: each finished checkpoint becomes the export, and a server's weights.

The folder has one export at a time, the newest, and is what a server loads when it starts. A running one is
told (`hf_model.vllm_plugin.reload`), and goes on with the new weights.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_eagle.checkpoint import TRACKER, has_checkpoint, read_model_config
from megatron_eagle.convert.mapping import ModelMapping
from megatron_eagle.convert.shards import HfWeights
from megatron_eagle.convert.to_hf import RECORD, export_hf
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.vllm_plugin.reload import WEIGHTS_PATH

_LOADS_WITHIN = 3600  # seconds: answers that are being written are waited for


@dataclass(frozen=True)
class Server:
    """The server of the export, and the secret by which it takes new weights."""

    url: str
    secret: str

    def iteration(self) -> int | None:
        """Which one it serves; None: it does not answer (yet).

        Raises:
            UserError: it is not one that `serve_vllm.sh --follow` started.
        """
        return self._ask("GET", 60)

    def load(self) -> int | None:
        """Let it load the export's weights; returns the iteration that it serves then.

        Raises:
            UserError: it refuses, or could not.
        """
        return self._ask("POST", _LOADS_WITHIN)

    def _ask(self, method: str, timeout: float) -> int | None:
        url = f"{self.url.rstrip('/').removesuffix('/v1')}{WEIGHTS_PATH}"
        headers = {"Authorization": f"Bearer {self.secret}"}
        request = urllib.request.Request(url, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                iteration: int | None = json.load(reply)["iteration"]
        except urllib.error.HTTPError as error:
            raise UserError(f"{url}: {error.code}: {_message(error)}") from None
        except (OSError, ValueError, KeyError):
            return None
        return iteration


def follow(
    checkpoint: Path, hf: Path, server: Server | None, *, every: float, say: Callable[[str], None]
) -> Iterator[int]:
    """Export each finished checkpoint of the run, and let the server load it; what fails is said and left.

    Files are not replaced while a server may be reading them: nothing is exported before it answers.

    Args:
        checkpoint: the run's checkpoint folder; it may be empty still.
        hf: a new folder, or an earlier export of the same model.
        every: seconds between two looks.
        say: is given a line for each event.

    Yields:
        The iteration that is exported, and served if there is a server, whenever it is another.

    Raises:
        UserError: `hf` holds another model, or something else than an export; the server is another.
    """
    told: set[str] = set()

    def once(line: str) -> None:
        if line not in told:
            told.add(line)
            say(line)

    failed, yielded = None, None
    if _exported(hf) is not None and has_checkpoint(checkpoint):
        _check_same_model(checkpoint, hf)
    while True:
        found, done = _latest(checkpoint), _exported(hf)
        served = None if server is None else server.iteration()
        try:
            if server is not None and served is None:
                once(f"{server.url}: waiting for the server")
            elif found is None:
                once(f"{checkpoint}: waiting for the first checkpoint")
            elif found not in (done, failed):
                _export(checkpoint, hf, say)
                continue
            elif server is not None and served != done:
                start = time.monotonic()
                served = server.load()
                say(f"{server.url}: iteration {served} served after {time.monotonic() - start:.1f} s")
        except UserError as error:  # a checkpoint that was removed meanwhile, a full disk
            if done is None:
                raise
            failed = found
            once(f"warning: iteration {found}: {error}; the next checkpoint is waited for")
        if done is not None and done != yielded and (server is None or served == done):
            yielded = done
            yield done
        time.sleep(every)


def _export(checkpoint: Path, hf: Path, say: Callable[[str], None]) -> None:
    start = time.monotonic()
    if _exported(hf) is not None:
        _check_same_model(checkpoint, hf)
    export_hf(checkpoint, hf)
    say(f"{hf}: iteration {_exported(hf)} exported in {time.monotonic() - start:.1f} s")


def _check_same_model(checkpoint: Path, hf: Path) -> None:
    """A server has room for tensors of the shapes that it started with."""
    wanted = ModelMapping(read_model_config(checkpoint), has_head=False).hf_shapes
    found = HfWeights(hf).shapes
    odd = sorted(name for name, shape in wanted.items() if found.get(name) != shape)
    if odd:
        raise UserError(f"{hf}: an export of another model than {checkpoint}, as {odd[0]}; name a new folder")


def _latest(checkpoint: Path) -> int | None:
    """Iteration that the run's tracker names; None: there is none yet."""
    try:
        text = (checkpoint / TRACKER).read_text().strip()
    except FileNotFoundError:
        return None
    return int(text) if text.isdecimal() else None


def _exported(hf: Path) -> int | None:
    try:
        iteration: int = json.loads((hf / RECORD).read_text())["iteration"]
    except (FileNotFoundError, KeyError):
        return None
    return iteration


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return error.reason
