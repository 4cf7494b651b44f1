"""Look into data before training on them: samples and packs of a store, problems of annotations, the mix,
and what tiles keep of pictures."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from megatron_eagle.commands.remote_options import add_remote_options, remote_settings
from megatron_eagle.data.annotations.mixture import datasets_of
from megatron_eagle.data.inspection.kept_pixels import LIMITS, TYPICAL, kept_table
from megatron_eagle.data.inspection.lint import FileReport, problems
from megatron_eagle.data.inspection.mix import recipe_mix, store_mix
from megatron_eagle.data.inspection.preview import check_row, describe_row
from megatron_eagle.data.inspection.preview_html import pack_page, sample_page
from megatron_eagle.data.media.images import DEFAULT_MAX_PIXELS
from megatron_eagle.data.media.remote.files import MediaAccess
from megatron_eagle.data.packing.index import read_packs
from megatron_eagle.data.store.reader import Rows, SampleStore
from megatron_eagle.data.store.shards import ShardStore, open_any_rows, store_folder
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.grids import TILINGS


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int | None:
    """Run the command; returns its exit status."""
    args = build_parser(prog).parse_args(argv)
    return {"show": show, "lint": lint, "mix": mix, "tiles": tiles}[args.command](args)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(prog, description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    shown = commands.add_parser("show", help="one sample or one pack")
    add = shown.add_argument
    add("data", metavar="D", help="folder of the token store")
    add("--sample", type=int, metavar="I", help="row of the store, from 0")
    add(
        "--pack",
        type=int,
        metavar="P",
        help="pack of the length's index, from 0 (default, where there is one)",
    )
    add("--length", type=int, help="token limit of the plan (default: the longest)")
    add("--json", action="store_true", help="print the sample as one JSON object")
    add("--html", metavar="OUT", help="write one self-contained page")
    add_remote_options(shown)
    linted = commands.add_parser("lint", help="problems by file and line; exits with 1 if there are any")
    add = linted.add_argument
    add("recipe", metavar="RECIPE", help="a recipe, or one annotation file")
    add("--no-media", action="store_true", help="look at the annotations only")
    add(
        "--max-pixels", type=int, default=DEFAULT_MAX_PIXELS, help="larger pictures are refused (%(default)s)"
    )
    add("--strict-jpeg", action="store_true", help="refuse JPEG files that libjpeg warns of (simplejpeg)")
    add_remote_options(linted)
    add = commands.add_parser("mix", help="what a recipe or a store mixes").add_argument
    add("path", metavar="PATH", help="a recipe, or the folder of a token store")
    add("--length", type=int, help="token limit of a store's plan (default: the longest)")
    add = commands.add_parser("tiles", help="what share of pictures' pixels their tiles keep").add_argument
    add("sizes", nargs="*", metavar="WxH", help="pictures, in pixels (default: typical ones)")
    add("--max-tiles", type=int, nargs="+", default=LIMITS, metavar="N", help="limits to compare")
    add("--tile-size", type=int, default=448, help="pixels a side of a tile (default %(default)s)")
    add("--tiling", choices=TILINGS, default="iap", help="how grids are chosen (default %(default)s)")
    return parser


def show(args: argparse.Namespace) -> None:
    """Print a sample as JSON, write a sample or a pack as a page."""
    if not (args.json or args.html):
        raise UserError("show needs --json or --html OUT")
    if args.sample is not None and args.pack is not None:
        raise UserError("show takes --sample or --pack, not both")
    store = _open(args.data, args.length)
    if args.json:
        if args.sample is None:
            raise UserError("--json shows one sample; name it with --sample I")
        print(json.dumps(describe_row(store, args.sample)))
    if args.html:
        if args.pack is not None and not isinstance(store, SampleStore):
            raise UserError(f"{store.path} is being made and has no packs yet; name a sample")
        media = MediaAccess(remote_settings(args))
        has_packs = (store.folder / "packs.arrow").is_file()
        if isinstance(store, SampleStore) and args.sample is None and (args.pack is not None or has_packs):
            index, pack = read_packs(store), args.pack or 0
            if not 0 <= pack < len(index):
                raise UserError(
                    f"{store.path} has packs 0 to {len(index) - 1} at length {store.length}, no {pack}"
                )
            page = pack_page(store, index, pack, media)
        else:
            page = sample_page(store, check_row(store, args.sample or 0), media)
        try:
            Path(args.html).write_text(page, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {args.html}: {error.strerror}") from None
        print(f"written to {args.html}")


def lint(args: argparse.Namespace) -> int:
    """Print FILE:LINE: PROBLEM for every line that cannot be used, then the counts."""
    counts: Counter[str] = Counter()
    n_lines = 0
    files = MediaAccess(remote_settings(args))
    with TemporaryDirectory() as cache:
        for dataset in datasets_of(args.recipe):
            report = FileReport(dataset)
            found = problems(
                dataset,
                media=not args.no_media,
                max_pixels=args.max_pixels,
                strict_jpeg=args.strict_jpeg,
                files=files,
                report=report,
                cache=Path(cache),
            )
            for problem in tqdm(found, desc=dataset.name, unit=" lines", dynamic_ncols=True):
                if problem is not None:
                    tqdm.write(f"{problem.file}:{problem.line}: {problem.reason}")
            for line in report.lines():
                tqdm.write(line)
            n_lines += report.n_records
            counts += report.kinds
    kinds = "".join(f"; {kind}: {count:,}" for kind, count in sorted(counts.items()))
    print(f"{n_lines:,} lines, {counts.total():,} with a problem{kinds}")
    return 1 if counts else 0


def mix(args: argparse.Namespace) -> None:
    """Print the shares of the data sets."""
    if store_folder(args.path).is_dir():
        print(store_mix(_open(args.path, args.length)))
    else:
        print(recipe_mix(args.path))


def tiles(args: argparse.Namespace) -> None:
    """Print for each picture what the most tiles keep, and their grid."""
    sizes = {size: _size(size) for size in args.sizes} or TYPICAL
    if min(*args.max_tiles, args.tile_size) < 1:
        raise UserError("--max-tiles and --tile-size must be at least 1")
    print(kept_table(sizes, args.max_tiles, tile_size=args.tile_size, tiling=args.tiling))


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(f"{text}: expected a picture's width and height in pixels, as 3840x2160")
    return int(width), int(height)


def _open(path: str, length: int | None) -> Rows:
    """A store, or what there is of one that is being made."""
    store = open_any_rows(path, length)
    if isinstance(store, ShardStore):
        there = f"{store.shards_there} of {store.n_shards} shards are there"
        print(f"{path} is being made: {there}, {len(store):,} rows", file=sys.stderr)
    return store
