"""Steps of the tiny model under the Megatron-Core of this interpreter: `megatron_steps.py OPTIONS.json`.

OPTIONS.json: {"world_size": ..., "parallel": ..., and what `tests.checkpoint.steps.steps` takes}. Prints a
line of JSON: the version, and what rank 0 found.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from tests.checkpoint.steps import steps


def main() -> None:
    options = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = steps(options.pop("world_size"), options.pop("parallel"), **options)[0]
    told = {name: found[name] for name in ("start", "losses", "norms")}
    print(json.dumps({"megatron": version("megatron-core"), **told}))


if __name__ == "__main__":
    main()
