"""Commands that pages show, parsed by the real parsers: an unknown flag or a missing file is found here.

Blocks of `bash` hold commands; blocks of `console` also what they print, after lines that begin with `$`.
Words in capitals stand for a user's values.
"""

import functools
import importlib.util
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_eagle.commands.table import COMMANDS, PROGRAM
from tests.paths import REPO
from tests.project import commands
from tests.project.markdown import code_blocks, without_code_blocks

LANGUAGES = ("bash", "console", "yaml", "python", "json", "jsonl", "text")
"""What a block may be: one that says nothing would pass unread."""

# What else pages tell a user to run, without words of this project.
_ELSEWHERE = (
    "git",
    "cd",
    "docker",
    "scancel",
    "export",
    "source",
    "pytest",
    "sudo",
    "vllm",
    "kubectl",
    "sky",
)
_SBATCH = {  # what a script does with its words
    "train.sbatch": ("tools/train.py", ["run", "--config"]),
    "convert.sbatch": ("tools/convert_hf.py", []),
    "preprocess.sbatch": ("tools/preprocess_data.py", ["run"]),
}
_PARSED = (
    "tools/",
    "examples/eagle_video/run.py",
)  # scripts whose parser can be caught before they do anything
_SPAN = re.compile(r"`([^`\n]+)`")


def problems(text: str) -> Iterator[str]:
    """What is wrong with the commands of a page, a line each."""
    for block in code_blocks(text):
        if block.language not in LANGUAGES:
            yield f"line {block.line}: a block of {block.language or 'nothing'}, not {', '.join(LANGUAGES)}"
        for command in shown(block.language, block.body):
            yield from (f"{command}: {problem}" for problem in check(command))
    for span in _SPAN.findall(without_code_blocks(text)):
        yield from (f"`{span}`: {problem}" for problem in check_span(span))


def shown(language: str, body: str) -> Iterator[str]:
    """The commands of a block, lines that go on put together, without comments."""
    lines = body.replace("\\\n", " ").splitlines()
    if language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    elif language != "bash":
        return
    for line in lines:
        yield from (part for part in _split(line) if part)


def check(command: str) -> Iterator[str]:
    """What is wrong with one command."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # the environment
        words.pop(0)
    if not words:
        return
    yield from _missing_files(words)
    try:
        yield from _check_program(words[0], words[1:])
    except commands.Refused as refused:
        yield str(refused)


def check_span(span: str) -> Iterator[str]:
    """What is wrong with a span of code inside a sentence: often a part of a command."""
    words = span.split()
    if words[0] == "make" and len(words) > 1:
        yield from _check_make(words[1:])
    if words[0] == "python":
        words.pop(0)
    if not words:
        return
    if re.match(r"tools/\w+\.py$", words[0]):
        if not (REPO / words[0]).is_file():
            yield "no such file"
            return
        known = commands.flags(commands.parser_of(REPO / words[0])) | _torchrun_flags()
    elif words[0] == PROGRAM and len(words) > 1 and not words[1].startswith("--"):
        if words[1] not in {*COMMANDS, "COMMAND"}:
            yield f"no command {words[1]}"
            return
        known = _all_flags()
    elif words[0].startswith("--"):
        known = _all_flags() | _slurm_flags()
    else:
        return
    for word in words:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in known:
            yield f"{flag} is no flag"


def _check_program(program: str, words: list[str]) -> Iterator[str]:
    if program == PROGRAM:
        yield from _check_command(words)
    elif program in ("python", "python3"):
        yield from _check_python(words)
    elif program == "torchrun":
        yield from _check_torchrun(words)
    elif program == "sbatch":
        script = next(word for word in words if not word.startswith("-"))
        tool, first = _SBATCH[Path(script).name]
        yield from _check_script(tool, [*first, *words[words.index(script) + 1 :]])
    elif program == "make":
        yield from _check_make(words)
    elif program == "pip":
        yield from _check_extras(words)
    elif (REPO / program).is_file():
        if not (REPO / program).stat().st_mode & 0o100:
            yield f"{program} cannot be executed"
    elif program not in _ELSEWHERE:
        yield f"what is {program}?"


def _check_python(words: list[str]) -> Iterator[str]:
    if words[:2] == ["-m", "megatron_eagle"]:
        yield from _check_command(words[2:])
    elif words[0] != "-m":
        yield from _check_script(words[0], words[1:])
    elif importlib.util.find_spec(words[1]) is None:
        yield f"no module {words[1]}"


def _check_script(script: str, words: Sequence[str]) -> Iterator[str]:
    if not (REPO / script).is_file():
        yield f"no file {script}"
    elif script.startswith(_PARSED):
        commands.check(commands.parser_of(REPO / script), words)


def _check_command(words: Sequence[str]) -> Iterator[str]:
    if words[:1] in (["--help"], ["--version"]):
        return
    if not words or words[0] not in COMMANDS:
        yield f"no command {' '.join(words[:1])}"
    else:
        commands.check(commands.parser_of_command(words[0], PROGRAM), words[1:])


def _check_torchrun(words: Sequence[str]) -> Iterator[str]:
    from torch.distributed.run import get_args_parser

    ours = ("megatron_eagle", PROGRAM)
    script = next((i for i, word in enumerate(words) if word.endswith(".py") or word in ours), len(words))
    commands.check(get_args_parser(), [*words[:script], "SCRIPT"])
    if words[script] in ours:
        yield from _check_command(words[script + 1 :])
    else:
        yield from _check_script(words[script], words[script + 1 :])


def _check_make(words: Sequence[str]) -> Iterator[str]:
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, equals, _ = word.partition("=")
        pattern = rf"\$\({name}\)|^{name} \?=|\$\(if \$\({name}\)" if equals else rf"^{name}:"
        if not re.search(pattern, makefile, re.MULTILINE):
            yield f"the Makefile has no {word}"


def _check_extras(words: Sequence[str]) -> Iterator[str]:
    setup = (REPO / "setup.py").read_text(encoding="utf-8")
    for extra in re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*?)\]", " ".join(words)))):
        if f'"{extra}": [' not in setup:
            yield f"setup.py has no extra {extra}"


def _missing_files(words: Sequence[str]) -> Iterator[str]:
    """Words that name a file below a folder of the repository, where there is none."""
    for word in words:
        top = word.split("/")[0]
        is_ours = "/" in word and top in {"docs", "examples", "kernels", "megatron_eagle", "tests", "tools"}
        if is_ours and not (REPO / word.split("::")[0]).exists():
            yield f"no file {word}"


def _split(line: str) -> Iterator[str]:
    """The commands of a line: those joined by `&&`, or sent to the background."""
    words: list[str] = []
    for word in [*shlex.split(line, comments=True), "&&"]:
        if word in ("&&", "&", ";"):
            yield shlex.join(words)
            words = []
        else:
            words.append(word)


@functools.cache
def _all_flags() -> set[str]:
    tools = [
        commands.flags(commands.parser_of(path)) for path in (*commands.scripts().values(), commands.BENCH)
    ]
    return set().union(*tools, _torchrun_flags())


@functools.cache
def _torchrun_flags() -> set[str]:
    from torch.distributed.run import get_args_parser

    # From torch 2.12 on; pages name them for a torchrun that may be newer than the one here.
    return commands.flags(get_args_parser()) | {"--signals-to-handle", "--shutdown-timeout"}


@functools.cache
def _slurm_flags() -> set[str]:
    """Those that the scripts of jobs give sbatch and srun themselves."""
    scripts = (REPO / "examples" / "slurm").glob("*.s*")
    return {flag for path in scripts for flag in re.findall(r"--[a-z][\w-]+", path.read_text())}
