"""`megatron-eagle COMMAND ...`: every command by name, imported when it is asked for."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from megatron_eagle import __version__
from megatron_eagle.config import nearest
from megatron_eagle.errors import UserError

PROGRAM = "megatron-eagle"

COMMANDS = {
    "preprocess": "make a token store from annotation files and media, or small copies of videos",
    "pack": "group the samples of a token store into packs of one length",
    "preview": "look at samples, packs, problems of annotations and the mix, before training on them",
    "plan": "list the parallel layouts of N GPUs for a run, fastest first, with memory",
    "convert": "make a checkpoint from a Hugging Face folder to begin with, and a folder from a checkpoint",
    "train": "check a run, train or resume it, see where it stands, draw it, replay a step",
    "generate": "ask a model, once or for a file of requests",
    "serve": "talk to a model in a browser",
    "compare": "compare the answers of an export and of a server",
    "evaluate": "score a model on benchmarks",
    "select": "select the clips of new videos that are unlike anything in the training set",
    "annotate": "write training samples on videos with the help of other models",
}
"""In the order in which people use them: name (and module beside this one) -> what it is for."""

EXTRAS = {"fastapi": "serve", "uvicorn": "serve"}
"""Libraries that a command imports at once and that come with an extra of the package."""


def main(argv: Sequence[str] | None = None) -> int | None:
    """Run the command that stands first.

    Args:
        argv: the words after the program's name; by default those of this process.

    Returns:
        The exit status, None for 0.

    Raises:
        UserError: no command has that name, or a library that it needs is not installed.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        return _run(*words)
    build_parser().parse_args(words)
    print(build_parser().format_help(), end="", file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    """What comes without a command: --help, which lists them, and --version."""
    width = max(map(len, COMMANDS)) + 2
    listed = "\n".join(f"  {name:<{width}}{about}" for name, about in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND ...",
        description="Long-context vision-language training (Eagle 2.5) on Megatron-Core.",
        epilog=f"commands, in the order of their use:\n{listed}\n\n"
        f"`{PROGRAM} COMMAND --help` says what a command takes. On several GPUs:\n"
        f"torchrun --nproc-per-node N -m megatron_eagle train run --config FILE",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    return parser


def _run(name: str, *words: str) -> int | None:
    if name not in COMMANDS:
        guess = nearest(name, COMMANDS)
        hint = f"did you mean {guess!r}?" if guess else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"{PROGRAM}: no command {name!r}; {hint}")
    try:
        command = importlib.import_module(f"megatron_eagle.commands.{name}")
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = f"pip install '{PROGRAM}[{EXTRAS[error.name]}]'"
        raise UserError(f"{PROGRAM} {name} needs {error.name}: {extra}") from None
    status: int | None = command.main(words, f"{PROGRAM} {name}")
    return status
