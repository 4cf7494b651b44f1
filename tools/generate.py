"""Ask an exported model.

    generate.py --hf H [--image F ...] [--video F ...] --prompt TEXT    one question, streamed
    generate.py --hf H --jsonl IN --output OUT                          many: {"prompt", "images", "videos"}

Decoding is greedy. Pictures and videos stand before the prompt, unless it says <image-1> or <video-1>.
"""

import argparse
from functools import partial
from pathlib import Path

from tqdm import tqdm

from megatron_eagle.errors import UserError, run_cli
from megatron_eagle.inference.generate import ExportedModel, Request, Sampling, answer_file


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=Path, required=True, help="exported folder")
    parser.add_argument("--prompt", help="the question")
    parser.add_argument("--image", action="append", default=[], metavar="F", help="picture (repeatable)")
    parser.add_argument("--video", action="append", default=[], metavar="F", help="video (repeatable)")
    parser.add_argument("--jsonl", type=Path, metavar="IN", help="requests, one JSON object a line")
    parser.add_argument("--output", type=Path, metavar="OUT", help="answers for --jsonl")
    parser.add_argument("--max-new-tokens", type=_positive(int), default=512, metavar="N")
    parser.add_argument("--fps", type=_positive(float), help="frames per second of video (default 2)")
    parser.add_argument("--max-frames", type=_positive(int), metavar="N", help="per video (default 256)")
    parser.add_argument(
        "--max-tiles", type=_positive(int), metavar="N", help="per picture (default: the model's)"
    )
    options = parser.parse_args()
    if (options.prompt is None) == (options.jsonl is None):
        raise UserError("give either --prompt TEXT or --jsonl IN --output OUT")
    if options.jsonl is not None and (options.output is None or options.image or options.video):
        raise UserError("--jsonl needs --output OUT, and its lines name their own images and videos")

    sampling = Sampling(options.fps, options.max_frames, options.max_tiles, options.max_new_tokens)
    model = ExportedModel(options.hf)
    if options.jsonl is None:
        request = Request(options.prompt, tuple(options.image), tuple(options.video))
        model.answer(request, sampling, stream=True)
        return
    progress = partial(tqdm, desc="answers", unit="answer")
    count = answer_file(model, options.jsonl, options.output, sampling, progress)
    print(f"{count} answers in {options.output}")


def _positive(kind: type):
    def parse(text: str):
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its messages
    return parse


if __name__ == "__main__":
    run_cli(main)
