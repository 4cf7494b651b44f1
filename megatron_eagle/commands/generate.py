"""Ask a model.

    %(prog)s --hf H [--image F ...] [--video F ...] [--document F ...] --prompt TEXT    streamed
    %(prog)s --hf H --jsonl IN --output OUT    many: {"prompt", "images", "videos", "documents"} a line

H is an exported folder. In its place:

    --checkpoint C    a training checkpoint of any layout: it is exported to a temporary folder first
    --endpoint URL    an OpenAI-compatible server, as tools/serve_vllm.sh starts one

Decoding is greedy. Media stand before the prompt, unless it says <image-1> or <video-1>; the pages of a
document (PDF) are pictures after the other ones. A --jsonl run that was stopped goes on when it is started
again; until it is complete its answers are in OUT.partial.
"""

import argparse
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from megatron_eagle.commands.server_options import add_timeout
from megatron_eagle.errors import UserError
from megatron_eagle.inference.batch import answer_file
from megatron_eagle.inference.generate import PREFILL_CHUNK, Answers, ExportedModel, Request, Sampling
from megatron_eagle.inference.server_client import ServedModel
from megatron_eagle.positions import add_option, check_option


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run the command."""
    options = build_parser(prog).parse_args(argv)
    images, videos, documents = map(tuple, (options.image, options.video, options.document))
    if (options.prompt is None) == (options.jsonl is None):
        raise UserError("give either --prompt TEXT or --jsonl IN --output OUT")
    if options.jsonl is not None and (options.output is None or (images or videos or documents)):
        raise UserError("--jsonl needs --output OUT, and its lines name their own media")

    if options.model is not None and options.endpoint is None:
        raise UserError("--model is a name on a server: it needs --endpoint URL")
    check_option(options)

    sampling = Sampling(options.fps, options.max_frames, options.max_tiles, options.max_new_tokens)
    with _model(options) as model:
        if options.jsonl is None:
            request = Request(options.prompt, images, videos, documents=documents)
            model.answer(request, sampling, on_text=partial(print, end="", flush=True))
            print()
            return
        name = str(options.hf or options.checkpoint or options.endpoint)
        progress = partial(tqdm, desc="answers", unit="answer")
        count = answer_file(model, options.jsonl, options.output, sampling, name, progress)
        print(f"{count} answers in {options.output}")


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--hf", type=Path, help="exported folder")
    source.add_argument("--checkpoint", type=Path, help="training checkpoint with a tokenizer")
    source.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server")
    parser.add_argument("--model", help="name of the model on the server (default: its first)")
    parser.add_argument("--prompt", help="the question")
    parser.add_argument("--image", action="append", default=[], metavar="F", help="picture (repeatable)")
    parser.add_argument("--video", action="append", default=[], metavar="F", help="video (repeatable)")
    parser.add_argument("--document", action="append", default=[], metavar="F", help="PDF file (repeatable)")
    parser.add_argument("--jsonl", type=Path, metavar="IN", help="requests, one JSON object a line")
    parser.add_argument("--output", type=Path, metavar="OUT", help="answers for --jsonl")
    parser.add_argument("--max-new-tokens", type=_positive(int), default=512, metavar="N")
    parser.add_argument("--fps", type=_positive(float), help="frames per second of video (default 2)")
    parser.add_argument(
        "--max-frames", type=_positive(int), metavar="N", help="per video (default: the model's)"
    )
    parser.add_argument(
        "--max-tiles", type=_positive(int), metavar="N", help="per picture (default: the model's)"
    )
    parser.add_argument(
        "--prefill-chunk",
        type=_positive(int),
        default=PREFILL_CHUNK,
        metavar="N",
        help="tokens of the prompt that are in the model at a time (%(default)s)",
    )
    add_timeout(parser)
    add_option(parser)
    return parser


@contextmanager
def _model(options: argparse.Namespace) -> Iterator[Answers]:
    """What answers. Megatron is imported for a checkpoint only, and only for its export."""
    if options.endpoint is not None:
        yield ServedModel(options.endpoint, options.model, options.timeout)
    elif options.checkpoint is not None:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing here is worth compiling
        from megatron_eagle.convert.to_hf import export_hf

        warnings.filterwarnings("ignore", category=FutureWarning)  # between Megatron and torch
        with TemporaryDirectory() as folder:
            export_hf(options.checkpoint, folder)
            yield _exported(folder, options)
    else:
        yield _exported(options.hf, options)


def _exported(folder: str | Path, options: argparse.Namespace) -> ExportedModel:
    return ExportedModel(folder, options.prefill_chunk, allow_long_prompts=options.allow_long_prompts)


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its messages
    return parse
