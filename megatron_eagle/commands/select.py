"""Select the clips of new videos that are unlike anything in the training set.

    %(prog)s --candidates NEW --existing OLD --encoder DIR --output O [--tau 0.5] [--distinct 0.9]

NEW and OLD name one video a line, or are training JSONL.  O holds the features, kept.jsonl, refused.jsonl and
report.html.  Started again, it uses what is finished.  See `megatron_eagle/eagle_video/selection.py`.

Many machines with one O share the work: --part 0/8 to --part 7/8, twice (features, then the search); then
once without --part.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megatron_eagle.config import from_dict
from megatron_eagle.eagle_video.encoder import Encoder
from megatron_eagle.eagle_video.features import WorkShare
from megatron_eagle.eagle_video.files import read_videos
from megatron_eagle.eagle_video.selection import SelectionSettings, select, selection_summary, work_on_part
from megatron_eagle.eagle_video.selection_report import write_selection_report
from megatron_eagle.errors import UserError
from megatron_eagle.problems import write_ledger


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    parser = build_parser(prog)
    options = parser.parse_args(argv)
    for name in (
        "clip_seconds",
        "fps",
        "batch_size",
        "videos_per_shard",
        "candidate_block",
        "existing_block",
    ):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    settings = from_dict(
        SelectionSettings,
        {
            "tau": options.tau,
            "distinct": options.distinct,
            "clips": {
                "clip_seconds": options.clip_seconds,
                "fps": options.fps,
                "videos_per_shard": options.videos_per_shard,
            },
            "blocks": {"candidates": options.candidate_block, "existing": options.existing_block},
        },
    )
    candidates, problems = read_videos(options.candidates)
    existing, more = read_videos(options.existing)
    encoder = Encoder(options.encoder, options.device, options.batch_size)
    options.output.mkdir(parents=True, exist_ok=True)
    write_ledger(options.output / "dropped.jsonl", [*problems, *more])
    progress = partial(tqdm, unit="shard")
    if options.part is not None:
        searched = work_on_part(
            candidates, existing, options.output, encoder, settings, options.part, progress
        )
        print("features and search done" if searched else "features done; for the search, again when all are")
        return
    selection = select(candidates, existing, options.output, encoder, settings, progress)
    write_selection_report(options.output / "report.html", selection, settings)
    print(selection_summary(selection))
    if problems or more:
        print(f"  unreadable lines        {len(problems) + len(more):,} (dropped.jsonl)")
    print(f"{options.output / 'kept.jsonl'}, {options.output / 'report.html'}")


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--candidates", type=Path, required=True, metavar="NEW", help="list of new videos")
    parser.add_argument("--existing", type=Path, required=True, metavar="OLD", help="what training has")
    parser.add_argument("--encoder", type=Path, required=True, metavar="DIR", help="CLIP or SigLIP folder")
    parser.add_argument("--output", type=Path, required=True, metavar="O", help="folder for everything")
    parser.add_argument("--tau", type=float, default=0.5, help="keep below this cosine (default %(default)s)")
    parser.add_argument("--distinct", type=float, metavar="TAU", help="also among the kept clips, in order")
    parser.add_argument("--clip-seconds", type=float, default=10.0, help="default %(default)s")
    parser.add_argument("--fps", type=float, default=1.0, help="frames a second (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="frames per forward (default %(default)s)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda if there is one)")
    parser.add_argument("--videos-per-shard", type=int, default=64, help="default %(default)s")
    parser.add_argument("--candidate-block", type=int, default=32768, help="rows (default %(default)s)")
    parser.add_argument("--existing-block", type=int, default=4096, help="rows (default %(default)s)")
    parser.add_argument("--part", type=_part, metavar="K/N", help="this machine's share, K from 0 to N - 1")
    return parser


def _part(text: str) -> WorkShare:
    try:
        number, of = map(int, text.split("/"))
        return WorkShare(number, of)
    except ValueError:
        raise UserError(f"--part {text}: expected K/N with K from 0 to N - 1, as 0/8") from None
