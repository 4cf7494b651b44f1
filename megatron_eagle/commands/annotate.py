"""Write training samples on videos with the help of other models.

    %(prog)s story --chapters FILE --videos DIR --endpoint URL --model NAME --output O.jsonl
    %(prog)s clips --clips kept.jsonl           --endpoint URL --model NAME --output O.jsonl

`story` reads chapters in the form of ViTT or VidChapters, or without --chapters finds parts by what changes
on screen; `clips` reads what `megatron-eagle select` kept.  The endpoint speaks OpenAI's protocol; its key
comes from an environment variable.  Every answer is kept in the cache: started again, a run goes on without
paying twice.  --dry-run counts requests and tokens and asks nothing.
"""

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_eagle.config import from_dict
from megatron_eagle.eagle_video.chapters import ChapteredVideo, read_chapters
from megatron_eagle.eagle_video.client import Asks, Client, DryRun, for_each
from megatron_eagle.eagle_video.clips import ClipQuestions, ClipSettings
from megatron_eagle.eagle_video.encoder import Encoder
from megatron_eagle.eagle_video.prompts import load_question_types
from megatron_eagle.eagle_video.records import Notes
from megatron_eagle.eagle_video.segmentation import SegmentSettings, detect_all
from megatron_eagle.eagle_video.selection import read_kept
from megatron_eagle.eagle_video.story import Story, StorySettings
from megatron_eagle.eagle_video.transport import Endpoint
from megatron_eagle.errors import UserError
from megatron_eagle.files import write_lines, write_whole


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    options = build_parser(prog).parse_args(argv)
    for name in ("fps", "max_frames", "questions", "side", "videos_at_once"):
        if getattr(options, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(options, name)}")
    if options.prompts and not options.prompts.is_dir():
        raise UserError(f"--prompts {options.prompts}: no such folder")
    endpoint = Endpoint(
        options.endpoint,
        options.model,
        options.key_variable,
        options.timeout,
        options.concurrency,
        options.requests_per_minute,
        options.tokens_per_minute,
        options.attempts,
        input_price=options.input_price,
        output_price=options.output_price,
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    cache = options.cache or options.output.with_suffix(".cache")
    if options.dry_run:
        dry = DryRun(endpoint)
        asyncio.run(_annotate(options, dry))
        print(dry.usage.estimate())
        return
    # The loop comes first: threads that still wait for an answer are let finish, and their answers kept.
    with asyncio.Runner() as runner, Client(endpoint, cache) as client:
        lines, notes = runner.run(_annotate(options, client))
        write_lines(options.output, lines)
        counts = notes.write(options.output.with_suffix(".dropped.jsonl"))
        write_whole(options.output.with_suffix(".usage.json"), json.dumps(client.usage.record(), indent=1))
    print(f"{len(lines):,} samples in {options.output}; {client.usage.summary()}")
    for kind, count in sorted(counts.items()):
        print(f"  {kind}: {count:,}")


async def _annotate(options: argparse.Namespace, client: Asks) -> tuple[list[dict[str, Any]], Notes]:
    sizes = {"fps": options.fps, "max_frames": options.max_frames, "side": options.side}
    sizes["questions"] = options.questions
    if options.recipe == "story":
        notes = Notes(str(options.chapters or options.videos))
        videos = _chaptered(options, notes)
        story = Story(client, options.output, notes, StorySettings(**sizes), options.prompts)
        asked = for_each(videos, story.annotate, options.videos_at_once)
    else:
        notes = Notes(str(options.clips))
        clips = read_kept(options.clips)
        types = load_question_types(options.question_types)
        settings = ClipSettings(**sizes, seed=options.seed)
        questions = ClipQuestions(client, options.output, notes, types, settings, options.prompts)
        asked = for_each(clips, questions.annotate, options.videos_at_once)
    try:
        results = await asked
    except* UserError as group:  # a wrong key or address: the first says it all
        raise group.exceptions[0] from None
    return [line for lines in results for line in lines], notes


def _chaptered(options: argparse.Namespace, notes: Notes) -> list[ChapteredVideo]:
    if not options.videos.is_dir():
        raise UserError(f"--videos {options.videos}: no such folder")
    if options.chapters is not None:
        return read_chapters(options.chapters, options.videos, notes)
    lengths = {"shortest": options.shortest_part, "longest": options.longest_part}
    settings = from_dict(SegmentSettings, lengths)
    encoder = Encoder(options.encoder) if options.encoder else None
    return detect_all(options.videos, notes, settings, encoder)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """What the command takes."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--endpoint", required=True, metavar="URL", help="address up to and including /v1")
    common.add_argument("--model", required=True, metavar="NAME", help="the model's name there")
    common.add_argument("--output", type=Path, required=True, metavar="O.jsonl", help="training lines")
    common.add_argument("--cache", type=Path, metavar="DIR", help="of answers (default: O.cache)")
    common.add_argument("--dry-run", action="store_true", help="count requests and tokens, ask nothing")
    common.add_argument(
        "--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="default %(default)s"
    )
    common.add_argument("--concurrency", type=int, default=8, help="requests at once (default %(default)s)")
    common.add_argument("--requests-per-minute", type=float, metavar="N", help="default: no limit")
    common.add_argument("--tokens-per-minute", type=float, metavar="N", help="estimated; default: no limit")
    common.add_argument("--timeout", type=float, default=120.0, help="seconds (default %(default)s)")
    common.add_argument("--attempts", type=int, default=6, help="per request (default %(default)s)")
    common.add_argument("--input-price", type=float, default=0.0, help="per million tokens")
    common.add_argument("--output-price", type=float, default=0.0, help="per million tokens")
    common.add_argument(
        "--prompts", type=Path, metavar="DIR", help="own NAME.vN.txt in place of shipped ones"
    )
    common.add_argument("--fps", type=float, default=2.0, help="frames a second (default %(default)s)")
    common.add_argument("--max-frames", type=int, default=50, help="at once (default %(default)s)")
    common.add_argument("--side", type=int, default=512, help="pixels of a frame (default %(default)s)")
    common.add_argument("--videos-at-once", type=int, default=8, help="default %(default)s")
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipes = parser.add_subparsers(dest="recipe", required=True)
    story = recipes.add_parser("story", parents=[common], help="chapters -> captions -> questions")
    story.add_argument("--chapters", type=Path, metavar="FILE", help="ViTT or VidChapters (default: detect)")
    story.add_argument("--videos", type=Path, required=True, metavar="DIR", help="holds ID.mp4 and the like")
    story.add_argument("--questions", type=int, default=5, help="per video (default %(default)s)")
    story.add_argument("--shortest-part", type=float, default=10, help="detected, seconds (%(default)s)")
    story.add_argument("--longest-part", type=float, default=300, help="detected, seconds (%(default)s)")
    story.add_argument("--encoder", type=Path, metavar="DIR", help="CLIP or SigLIP to detect with")
    clips = recipes.add_parser("clips", parents=[common], help="clips -> questions -> anchors")
    clips.add_argument(
        "--clips", type=Path, required=True, metavar="kept.jsonl", help="of `megatron-eagle select`"
    )
    clips.add_argument("--questions", type=int, default=3, help="per clip (default %(default)s)")
    clips.add_argument("--question-types", type=Path, metavar="YAML", help="own pool of kinds of questions")
    clips.add_argument("--seed", type=int, default=0, help="of the kinds per clip (default %(default)s)")
    return parser
