"""Do an export and a server give the same answers?

    %(prog)s --hf H --endpoint URL --jsonl IN

IN holds requests as for `megatron-eagle generate`, {"prompt", "images", "videos", "documents"} a line. Each
goes to both; a table shows how far their answers agree. Exits with 1 if fewer than --at-least of them
(default: all) are equal. A server that preprocesses otherwise, as vLLM does without the export's plugin
(docs/conversion.md), cannot agree everywhere.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_eagle.commands.server_options import add_timeout
from megatron_eagle.errors import UserError
from megatron_eagle.inference.batch import read_requests
from megatron_eagle.inference.generate import ExportedModel, Sampling
from megatron_eagle.inference.server_client import ServedModel
from megatron_eagle.positions import add_option, warn_of_server


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status."""
    options = build_parser(prog).parse_args(argv)
    if not 0 < options.at_least <= 1:
        raise UserError(f"--at-least {options.at_least:g}: expected a share above 0, at most 1")
    requests = list(read_requests(options.jsonl))
    if not requests:
        raise UserError(f"{options.jsonl}: has no requests")

    served = ServedModel(options.endpoint, options.model, options.timeout)
    exported = ExportedModel(options.hf, allow_long_prompts=options.allow_long_prompts)
    warn_of_server(served.read_max_positions(), exported.max_positions)
    sampling = Sampling(options.fps, options.max_frames, None, options.max_new_tokens)
    rows = []
    for where, record, request in tqdm(requests, desc="requests", unit="request"):
        try:
            answers = [model.answer(request, sampling) for model in (exported, served)]
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        rows.append({**record, "export": answers[0], "server": answers[1], "agree": _agreement(*answers)})
    if options.output is not None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        options.output.write_text(text, encoding="utf-8")
    print(_table(rows))
    equal = sum(row["agree"] == 1 for row in rows)
    print(f"{equal} of {len(rows)} answers are equal")
    return int(equal < options.at_least * len(rows))


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=Path, required=True, help="exported folder")
    parser.add_argument("--endpoint", required=True, metavar="URL", help="OpenAI-compatible server")
    parser.add_argument("--model", help="name of the model on the server (default: its first)")
    parser.add_argument("--jsonl", type=Path, required=True, metavar="IN", help="requests")
    parser.add_argument("--output", type=Path, metavar="OUT", help="both answers to each request, as JSONL")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--fps", type=float, help="frames per second of video (default 2)")
    parser.add_argument("--max-frames", type=int, metavar="N", help="per video (default: the model's)")
    parser.add_argument(
        "--at-least", type=float, default=1.0, metavar="SHARE", help="of equal answers (%(default)s)"
    )
    add_timeout(parser)
    add_option(parser)
    return parser


def _agreement(one: str, other: str) -> float:
    """Characters before the first difference, of the longer answer; 1 for equal answers. Greedy answers that
    part once have nothing to do with each other from there."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    length = max(len(one), len(other))
    return 1.0 if one == other else (min(len(one), len(other)) if same is None else same) / length


def _table(rows: list[dict[str, Any]]) -> str:
    head = f"{'agree':>6}  {'export':<40}  {'server':<40}"
    return "\n".join(
        [head]
        + [f"{row['agree']:>6.0%}  {_short(row['export']):<40}  {_short(row['server']):<40}" for row in rows]
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:39] + "…"
