"""Preprocessing that kills itself: `python -m tests.data.killed RECIPE OUTPUT TOKENIZER WHAT N WHEN`.

WHAT is a function of `POINTS`, N its how many-th call, WHEN `before` or `after`.
"""

import os
import signal
import sys
from pathlib import Path

from megatron_eagle.data.preparation import preprocess as module
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.store.writer import StoreWriter

POINTS = {"rename": (Path, "rename"), "add": (StoreWriter, "add"), "ledger": (module, "write_ledger")}
EXECUTION = module.Execution(workers=1, shard=8)


def settings(tokenizer: str) -> PreprocessSettings:
    """Two lengths, tiles of one token."""
    return PreprocessSettings(tokenizer, lengths=(100, 300), sampling=SamplingSettings(tile_size=28))


def main() -> None:
    """Preprocess, up to the point."""
    recipe, output, tokenizer, what, count, when = sys.argv[1:]
    owner, name = POINTS[what]
    original = getattr(owner, name)
    calls = 0

    def killing(*arguments):
        nonlocal calls
        calls += 1
        if (when, calls) == ("before", int(count)):
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments)
        if (when, calls) == ("after", int(count)):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, killing)
    module.preprocess(recipe, output, settings(tokenizer), EXECUTION)


if __name__ == "__main__":
    main()
