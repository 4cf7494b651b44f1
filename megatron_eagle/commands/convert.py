"""Convert between Hugging Face folders and Megatron checkpoints, and compare them.

%(prog)s import --hf H --checkpoint C     H: an Eagle 2.5 folder; C: a new folder
%(prog)s export --checkpoint C --hf H     C: a checkpoint of any layout; H: a new or earlier export

A model to begin stage 1 with, from a Qwen2.5 or Qwen3 and a SigLIP or SigLIP2 folder (DIR: the language
model's own tokenizer with the image tokens added):

%(prog)s import --language Q --vision S --tokenizer DIR --checkpoint C

Comparisons, which exit with 1 if something differs:

%(prog)s verify --hf H --checkpoint C     every tensor bit for bit, and logits on prompts with media
%(prog)s diff A B                         A, B: Hugging Face folders or checkpoints
%(prog)s certify --hf H --checkpoint C    what training, processor, transformers and a server (--endpoint) see

Of a run that goes on:

%(prog)s follow --checkpoint C --hf H     each finished checkpoint becomes the export, and a server's

Of a checkpoint with LoRA adapters:

%(prog)s export --checkpoint C --hf H               H: the model with its adapters merged
%(prog)s export --checkpoint C --adapter A          A: the adapters alone, as peft stores them
%(prog)s export --checkpoint C --hf H --adapter A   H: the model without adapters, A: those that fit it

An adapter belongs to the model that the run started from.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from megatron_eagle.commands.server_options import add_timeout
from megatron_eagle.errors import UserError


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int | None:
    """Run the command; returns its exit status."""
    options = build_parser(prog).parse_args(argv)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing here is worth compiling
    run = {
        "import": _import,
        "export": _export,
        "follow": _follow,
        "verify": _verify,
        "diff": _diff,
        "certify": _certify,
    }[options.command]
    return run(options)


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, *, checkpoint: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        if checkpoint:
            command.add_argument("--hf", type=Path, help="Hugging Face folder")
            command.add_argument("--checkpoint", type=Path, required=True, help="Megatron checkpoint folder")
        return command

    command = add("import", "make a checkpoint from a Hugging Face folder, or from its parts")
    command.add_argument("--language", type=Path, help="Qwen folder, with --vision and --tokenizer")
    command.add_argument("--vision", type=Path, help="SigLIP or SigLIP2 folder (fixed resolution)")
    command.add_argument("--tokenizer", type=Path, help="the language model's tokenizer with image tokens")
    command.add_argument("--tile-size", type=int, help="pixels a side (default: as the encoder's pictures)")
    command.add_argument("--seed", type=int, default=0, help="of the fresh connector (default 0)")
    command.add_argument(
        "--allow-pickle", action="store_true", help="read pytorch_model*.bin (tensors only) too"
    )

    command = add("export", "make a Hugging Face folder from a checkpoint")
    command.add_argument(
        "--max-tiles", type=int, help="tiles per picture for the exported processor (default: the source's)"
    )
    command.add_argument(
        "--max-frames", type=int, help="of a video, likewise (default: the data's, or the source's, or 256)"
    )
    command.add_argument("--license", help="the export's, as the Hub names it, for its README.md")
    command.add_argument(
        "--scores",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of `megatron-eagle evaluate run --published`, for its README.md",
    )
    command.add_argument("--adapter", type=Path, help="folder for LoRA adapters, which --hf then leaves out")
    command.add_argument(
        "--no-verify",
        action="store_true",
        help="do not compare the checkpoint's files with its manifest first",
    )

    command = add("follow", "export each finished checkpoint of a run, and let a server load it")
    command.add_argument(
        "--endpoint",
        metavar="URL",
        help="vLLM that `tools/serve_vllm.sh H --follow C` started, which calls this",
    )
    command.add_argument(
        "--every", type=float, default=10, metavar="SECONDS", help="between looks (default 10)"
    )
    command.add_argument("--once", action="store_true", help="end when there is an export; wait for one")

    command = add("verify", "compare a checkpoint with a Hugging Face folder: tensors and logits")
    command.add_argument("--tensors-only", action="store_true", help="no logits")
    command.add_argument("--prompt", help="ask this instead of the built-in prompts")
    command.add_argument("--image", action="append", default=[], metavar="F", help="picture for --prompt")
    command.add_argument("--video", action="append", default=[], metavar="F", help="video for --prompt")
    command.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference over the largest logit (1e-4)"
    )

    command = add("diff", "compare two Hugging Face folders or checkpoints", checkpoint=False)
    command.add_argument("first", type=Path)
    command.add_argument("second", type=Path)
    command.add_argument("--limit", type=int, default=20, help="tensors to list (default 20)")

    text = (
        "compare what every path makes of samples, up to logits, and write certificate.json into the export"
    )
    command = add("certify", text, checkpoint=False)
    command.add_argument("--hf", type=Path, required=True, help="exported folder")
    command.add_argument("--checkpoint", type=Path, help="of the export: its logits are compared too")
    command.add_argument("--endpoint", metavar="URL", help="vLLM that serves the export with its plugin")
    command.add_argument("--store", type=Path, metavar="D", help="packed token store (default: made samples)")
    command.add_argument("--samples", type=int, default=16, metavar="N", help="of the store (default 16)")
    command.add_argument("--logits", type=float, default=1e-4, help="most in transformers (default 1e-4)")
    command.add_argument("--logprobs", type=float, default=1e-3, help="most in vLLM (default 1e-3)")
    add_timeout(command)
    return parser


def _import(options: argparse.Namespace) -> None:
    parts = {name: getattr(options, name) for name in ("language", "vision", "tokenizer")}
    if (options.hf is None) == (None in parts.values()):
        raise UserError("import: name either --hf, or --language, --vision and --tokenizer")
    from megatron_eagle.convert.from_hf import import_hf
    from megatron_eagle.convert.from_parts import Parts, import_parts

    _quiet()
    if options.hf is not None:
        config = import_hf(options.hf, options.checkpoint, allow_pickle=options.allow_pickle)
    else:
        parts |= {name: getattr(options, name) for name in ("tile_size", "seed", "allow_pickle")}
        config = import_parts(Parts(**parts), options.checkpoint)
    print(
        f"{options.checkpoint}: {config.text.num_hidden_layers} language layers, "
        f"{config.vision.num_hidden_layers} vision layers, {config.text.vocab_size} tokens, prompts of up to "
        f"{config.text.max_position_embeddings:,} tokens (max_position_embeddings)"
    )


def _export(options: argparse.Namespace) -> None:
    if options.hf is None and options.adapter is None:
        raise UserError("export: name --hf, --adapter or both")
    from megatron_eagle.checkpoint import read_model_config
    from megatron_eagle.convert.lora import export_adapter
    from megatron_eagle.convert.model_card import CardFacts, Score
    from megatron_eagle.convert.to_hf import export_hf
    from megatron_eagle.evaluation.summary import read_result

    _quiet()
    results = [read_result(folder) for folder in options.scores]
    scores = [Score(r.benchmark, r.score, r.asked, r.split.questions, r.frames) for r in results]
    merge, verify = options.adapter is None, not options.no_verify
    if not merge:
        files = export_adapter(options.checkpoint, options.adapter, base=options.hf, verify=verify)
        verify = False  # once is enough
        positions = read_model_config(options.checkpoint).text.max_position_embeddings
        print(f"{options.adapter}: {', '.join(files)}; trained for prompts of up to {positions:,} tokens")
    if options.hf is not None:
        files = export_hf(
            options.checkpoint,
            options.hf,
            max_tiles=options.max_tiles,
            max_frames=options.max_frames,
            merge=merge,
            verify=verify,
            facts=CardFacts(options.license, scores),
        )
        print(f"{options.hf}: {', '.join(files)}")


def _follow(options: argparse.Namespace) -> None:
    if options.hf is None:
        raise UserError("follow: name --hf, the export's folder")
    if not options.every > 0:
        raise UserError(f"--every {options.every:g}: expected seconds above 0")
    from megatron_eagle.convert.follow import Server, follow
    from megatron_eagle.hf_model.vllm_plugin.reload import SECRET

    _quiet()
    server = None
    if options.endpoint is not None:
        if not os.environ.get(SECRET):
            raise UserError(
                f"--endpoint: {SECRET} is not set; tools/serve_vllm.sh H --follow C sets it for both"
            )
        server = Server(options.endpoint, os.environ[SECRET])
    say = partial(print, flush=True)
    for _ in follow(options.checkpoint, options.hf, server, every=options.every, say=say):
        if options.once:
            return


def _verify(options: argparse.Namespace) -> int:
    if options.hf is None:
        raise UserError("verify: name --hf, the folder to compare with")
    if (options.image or options.video) and options.prompt is None:
        raise UserError("verify: --image and --video need --prompt")
    from megatron_eagle.convert.verify import compare_logits, default_prompts, user_prompt

    _quiet()
    wrong = _print_differences(options.hf, options.checkpoint, limit=20)
    if options.tensors_only:
        return int(wrong > 0)
    prompts = default_prompts()
    if options.prompt is not None:
        prompts = {"yours": user_prompt(options.prompt, options.image, options.video)}
    print(f"\n{'logits':14}{'tokens':>8}{'tiles':>7}{'difference':>13}{'of largest':>13}{'same choice':>13}")
    for row in compare_logits(options.hf, options.checkpoint, prompts):
        agrees = row.relative <= options.tolerance  # not so for NaN
        wrong += not agrees
        print(
            f"{row.prompt:14}{row.tokens:8}{row.tiles:7}{row.max_abs:13.2e}{row.relative:13.2e}"
            f"{100 * row.same_choice:12.1f}%  {'ok' if agrees else 'DIFFERS'}"
        )
    print("\nthe same model" if not wrong else "\nNOT the same model")
    return int(wrong > 0)


def _diff(options: argparse.Namespace) -> int:
    _quiet()
    return int(_print_differences(options.first, options.second, options.limit) > 0)


def _certify(options: argparse.Namespace) -> int:
    if options.samples < 1:
        raise UserError(f"--samples {options.samples}: expected at least 1")
    from megatron_eagle.certify.certifying import CertifySettings, certify
    from megatron_eagle.certify.report import report
    from megatron_eagle.convert.to_hf import note_certificate

    _quiet()
    given = {name: value for name, value in vars(options).items() if name != "command"}
    certificate = certify(CertifySettings(**given, command=[Path(sys.argv[0]).name, *sys.argv[1:]]))
    print(report(certificate))
    note_certificate(options.hf)
    return int(not certificate.green)


def _print_differences(first: Path, second: Path, limit: int) -> int:
    """Print what differs between two models' tensors; returns how many do."""
    from megatron_eagle.convert.compare import differences, open_tensors

    one, other = open_tensors(first), open_tensors(second)
    found = list(differences(one, other))
    for difference in found[:limit]:
        apart = "" if difference.max_abs is None else f", largest difference {difference.max_abs:.3g}"
        print(f"{difference.name}: {difference.what}{apart}")
    if len(found) > limit:
        print(f"and {len(found) - limit} more")
    total = len(one.shapes.keys() | other.shapes.keys())
    print(f"{total - len(found)} of {total} tensors are equal bit for bit")
    return len(found)


def _quiet() -> None:
    """After the imports, which reset earlier filters. The warnings lie between Megatron and torch."""
    import megatron.core  # noqa: F401
    from transformers import logging

    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
