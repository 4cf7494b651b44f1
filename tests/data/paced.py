"""Preprocessing that a test lets go on: `python -m tests.data.paced RECIPE OUTPUT TOKENIZER ROWS GATE`.

Line n (from 1) is processed when the number in the file GATE is at least n.
"""

import sys
import time
from itertools import count
from pathlib import Path

from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import SampleProcessor
from tests.data.killed import settings


def main() -> None:
    """Preprocess, as far as the gate is open; two lines between commits."""
    recipe, output, tokenizer, rows, gate = sys.argv[1:]
    process, lines = SampleProcessor.process, count(1)

    def paced(self, task):
        line = next(lines)
        while int(Path(gate).read_text() or 0) < line:
            time.sleep(0.02)
        return process(self, task)

    SampleProcessor.process = paced
    preprocess(recipe, output, settings(tokenizer), Execution(workers=1, shard=4), follow=int(rows))


if __name__ == "__main__":
    main()
