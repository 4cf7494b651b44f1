"""Make a token store from annotation files and media (`run`), or small copies of videos (`transcode`)."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_eagle.commands.remote_options import add_remote_options, remote_settings
from megatron_eagle.data.media.images import DEFAULT_MAX_PIXELS
from megatron_eagle.data.media.transcode import AUDIO, CODECS, TranscodeSettings
from megatron_eagle.data.preparation.engines import ENGINES
from megatron_eagle.data.preparation.preprocess import Execution, preprocess
from megatron_eagle.data.preparation.processor import PreprocessSettings
from megatron_eagle.data.preparation.report import format_kept, kept_of_datasets, plot_kept
from megatron_eagle.data.preparation.summary import format_summary
from megatron_eagle.data.preparation.transcode import transcode
from megatron_eagle.data.sampling.ads import SamplingSettings
from megatron_eagle.data.store.shards import ROWS
from megatron_eagle.data.text.template import VARIANTS
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.grids import TILINGS


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    args = build_parser(prog).parse_args(argv)
    args.command(args)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(prog, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands.add_parser("run", help="make a store"))
    _add_transcode(
        commands.add_parser("transcode", help="videos as tiles, with a key frame every few frames")
    )
    return parser


def _add_run(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=run)
    add = command.add_argument
    add("--recipe", required=True, help="JSON or YAML: name -> {annotation, root, repeat_time, ...}")
    add("--tokenizer", required=True, help="folder with a tokenizer.json")
    add("--output", required=True, help="the store's folder; an earlier store there is replaced")
    add("--max-tokens", required=True, type=int, nargs="+", metavar="N", help="token limits to plan for")
    add("--tile-size", type=int, default=448, help="pixels a side of a tile (default %(default)s)")
    add("--patch-size", type=int, default=14, help="pixels a side of a vision patch (default %(default)s)")
    add("--max-tiles", type=int, default=12, help="most tiles per picture (default %(default)s)")
    add("--tiling", choices=TILINGS, default="iap", help="how grids are chosen (default %(default)s)")
    add("--fps", type=float, default=2.0, help="frames wanted per second of video (default %(default)s)")
    add("--min-frames", type=int, default=8, help="fewest frames per video (default %(default)s)")
    add("--max-frames", type=int, default=512, help="most frames per video (default %(default)s)")
    add(
        "--max-pixels", type=int, default=DEFAULT_MAX_PIXELS, help="larger pictures are refused (%(default)s)"
    )
    add("--strict-jpeg", action="store_true", help="refuse JPEG files that libjpeg warns of (simplejpeg)")
    add("--template", choices=VARIANTS, default="train", help="chat template variant (default %(default)s)")
    add("--workers", type=int, help="processes (default: one per core)")
    add("--engine", choices=ENGINES, default="local", help="this machine, or a Ray cluster (RAY_ADDRESS)")
    add(
        "--follow",
        type=int,
        nargs="?",
        const=ROWS,
        default=0,
        metavar="ROWS",
        help="mix the data sets evenly, so that training may start while this runs (data.follow); in shards "
        f"of so many rows (default {ROWS})",
    )
    add("--fresh", action="store_true", help="do not use what an earlier run has left")
    add(
        "--retry-failed",
        action="store_true",
        help="of a finished store, try only those lines again that were dropped for their media",
    )
    add("--report", metavar="FILE", help="also draw what each data set wanted and got, for example as PNG")
    add_remote_options(command)


def _add_transcode(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=run_transcode)
    defaults = TranscodeSettings()
    add = command.add_argument
    add("source", metavar="SOURCE", help="a recipe, an annotation file, or a folder of videos")
    add("--output", required=True, help="folder for the copies and the annotations that name them")
    add("--size", type=int, default=defaults.size, help="pixels a side of a tile (default %(default)s)")
    add("--gop", type=int, default=defaults.gop, help="frames from key frame to key frame (%(default)s)")
    add("--codec", choices=CODECS, default=defaults.codec, help="default %(default)s")
    add("--crf", type=int, default=defaults.crf, help="constant quality, lower is better (%(default)s)")
    add("--audio", choices=AUDIO, default=defaults.audio, help="default %(default)s")
    add("--workers", type=int, help="processes (default: one per core)")
    add_remote_options(command)


def run(args: argparse.Namespace) -> None:
    """Make a store and print what became of the samples."""
    try:
        sampling = SamplingSettings(
            args.fps, args.min_frames, args.max_frames, args.max_tiles, args.tile_size, args.tiling
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    settings = PreprocessSettings(
        args.tokenizer,
        tuple(args.max_tokens),
        sampling,
        args.patch_size,
        args.template,
        args.max_pixels,
        args.strict_jpeg,
        remote_settings(args),
    )
    execution = Execution(args.workers, args.engine, args.fresh, retry_failed=args.retry_failed)
    start = time.perf_counter()
    manifest = preprocess(args.recipe, args.output, settings, execution, follow=args.follow)
    print(format_summary(manifest.counts))
    kept = kept_of_datasets(args.output)
    print(f"\n{format_kept(kept)}")
    if args.report:
        plot_kept(kept, args.report)
    print(f"\n{time.perf_counter() - start:.1f} s -> {args.output}")
    if any(counts["dropped"] for counts in manifest.counts.values()):
        print(f"why samples were dropped: {Path(args.output) / 'dropped.jsonl'}")
    if empty := [length for length, counts in manifest.counts.items() if not counts["rows"]]:
        raise UserError(f"no sample is left at length {', '.join(empty)}; see {args.output}/dropped.jsonl")


def run_transcode(args: argparse.Namespace) -> None:
    """Copy the videos and print how many, and what they take."""
    settings = TranscodeSettings(args.size, args.gop, args.codec, args.crf, args.audio)
    made = transcode(args.source, args.output, settings, args.workers, remote_settings(args))
    before, after = (sum(getattr(c, name) for c in made.copies) / 1e9 for name in ("source_bytes", "bytes"))
    print(
        f"{len(made.copies):,} copies, {made.n_new:,} of them new: {before:.3f} GB -> {after:.3f} GB "
        f"in {args.output}"
    )
    if made.failures:
        print(f"{len(made.failures):,} videos have no copy; why: {Path(args.output) / 'failed.jsonl'}")
