"""Score an exported model on a benchmark.

    evaluate.py --hf H --benchmark B.jsonl --output O [--max-frames 512]

B holds one question a line, see `megatron_eagle/evaluation/benchmarks.py`.  O holds the answers, the scores
and what could not be asked.  Started again, it goes on.
"""

import argparse
import hashlib
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megatron_eagle.errors import UserError, run_cli
from megatron_eagle.evaluation.benchmarks import read_benchmark
from megatron_eagle.evaluation.runner import evaluate, render
from megatron_eagle.inference.generate import ExportedModel, Sampling


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=Path, required=True, metavar="H", help="exported folder")
    parser.add_argument("--benchmark", type=Path, required=True, metavar="B.jsonl", help="questions")
    parser.add_argument("--output", type=Path, required=True, metavar="O", help="folder of the results")
    parser.add_argument("--fps", type=float, default=2.0, help="of video (default %(default)s)")
    parser.add_argument("--max-frames", type=int, default=256, help="per video (default %(default)s)")
    parser.add_argument("--max-tiles", type=int, metavar="N", help="per picture (default: the model's)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default %(default)s")
    options = parser.parse_args()
    for name in ("fps", "max_frames", "max_tiles", "max_new_tokens"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(options, name)}")
    questions, problems = read_benchmark(options.benchmark)
    sampling = Sampling(options.fps, options.max_frames, options.max_tiles, options.max_new_tokens)
    about = {
        "model": str(options.hf.resolve()),
        "benchmark": str(options.benchmark),
        "sha256": hashlib.sha256(options.benchmark.read_bytes()).hexdigest(),
    }
    progress = partial(tqdm, unit="question")
    rows = evaluate(
        partial(ExportedModel, options.hf), questions, problems, options.output, sampling, about, progress
    )
    print(render(rows))
    lost = len((options.output / "dropped.jsonl").read_text(encoding="utf-8").splitlines())
    if lost:
        print(f"{lost:,} questions in no score: {options.output / 'dropped.jsonl'}")


if __name__ == "__main__":
    run_cli(main)
