"""Talk to a model in a browser about pictures, videos and PDF files, and see what it sees of them.

    %(prog)s --hf H                     an exported folder, on this machine
    %(prog)s --endpoint URL [--hf H]    an OpenAI-compatible server; H shows what the export would see

The page is at http://127.0.0.1:7860. Uploads are deleted when the server ends.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from megatron_eagle.commands.server_options import add_timeout
from megatron_eagle.errors import UserError
from megatron_eagle.hf_model.vllm_plugin.certificate import certificate_line
from megatron_eagle.inference.demo import Demo, make_app
from megatron_eagle.inference.demo_media import Limits, Viewer
from megatron_eagle.inference.generate import (
    Answers,
    ExportedModel,
    Sampling,
    load_processor,
    read_max_positions,
)
from megatron_eagle.inference.server_client import ServedModel
from megatron_eagle.positions import add_option, check_option, warn_of_server

LOCAL = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    options = build_parser(prog).parse_args(argv)
    if options.hf is None and options.endpoint is None:
        raise UserError("give --hf H, --endpoint URL, or both")
    if options.model is not None and options.endpoint is None:
        raise UserError("--model is a name on a server: it needs --endpoint URL")
    check_option(options)
    positive = ("max_new_tokens", "fps", "max_frames", "max_tiles")
    limited = ("max_megabytes", "max_megapixels", "max_question_megapixels", "max_pages", "max_minutes")
    for name in (*positive, *limited):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value} is not positive")

    model: Answers
    limit: int | None
    if options.endpoint is None:
        model = exported = ExportedModel(options.hf, allow_long_prompts=options.allow_long_prompts)
        processor, limit = exported.processor, exported.max_positions
        refused = None if options.allow_long_prompts else limit
        name = options.hf.resolve().name
    else:
        model = served = ServedModel(options.endpoint, options.model, options.timeout)
        if options.max_tiles is not None and served.cutting is None:
            raise UserError("--max-tiles: tiles are the server's own setting; leave it out")
        processor, limit = None, served.read_max_positions()
        refused = limit if served.cutting else None  # others may count otherwise, and refuse by themselves
        if options.hf is not None:
            processor, trained = load_processor(options.hf), read_max_positions(options.hf)
            warn_of_server(limit, trained)
            limit = min(limit or trained, trained)
        name = f"{served.model} at {options.endpoint}"
    sampling = Sampling(options.fps, options.max_frames, options.max_tiles, options.max_new_tokens)
    if options.hf is not None and (line := certificate_line(options.hf)):
        print(f"{options.hf}: {line}", file=sys.stderr)
    limits = Limits(
        megabytes=options.max_megabytes,
        pixels=options.max_megapixels * 10**6,
        question_pixels=options.max_question_megapixels * 10**6,
        pages=options.max_pages,
        seconds=options.max_minutes * 60,
    )
    viewer = Viewer(processor, sampling, limits, refused)
    demo = Demo(model, viewer, {"model": name, "token_limit": limit}, refused)
    local = options.host in LOCAL
    if not local:
        print(
            f"warning: --host {options.host}: everybody who reaches this machine can upload and ask; "
            "there is no password and no encryption",
            file=sys.stderr,
        )
    config = uvicorn.Config(
        make_app(demo, local),
        host=options.host,
        port=options.port,
        log_level="info",
        access_log=False,
        timeout_graceful_shutdown=3,
    )
    uvicorn.Server(config).run()


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=Path, help="exported folder")
    parser.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server that answers")
    parser.add_argument("--model", help="name of the model on the server (default: its first)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="0: any free one (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer")
    parser.add_argument("--fps", type=float, help="frames per second of video (default 2)")
    parser.add_argument("--max-frames", type=int, metavar="N", help="per video (default: the model's)")
    parser.add_argument("--max-tiles", type=int, metavar="N", help="per picture (default: the model's)")
    limits = Limits()
    for name, default, what in (
        ("megabytes", limits.megabytes, "of an upload"),
        ("megapixels", limits.pixels // 10**6, "of a picture"),
        ("question-megapixels", limits.question_pixels // 10**6, "that a question takes at once: 4 MB each"),
        ("pages", limits.pages, "of a document"),
        ("minutes", limits.seconds // 60, "of a video"),
    ):
        parser.add_argument(
            f"--max-{name}", type=int, default=default, metavar="N", help=f"{what} (%(default)s)"
        )
    add_timeout(parser)
    add_option(parser)
    return parser
