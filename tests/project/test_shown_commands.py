"""Commands that pages show are commands; quick ones print what the pages say; faults are noticed."""

import doctest
import shlex

import pytest

from megatron_eagle.commands import table
from tests.paths import REPO
from tests.project import commands, shown_commands
from tests.project.markdown import code_blocks, pages, without_parts

CHEAP = ("megatron-eagle plan ", "megatron-eagle evaluate list", "megatron-eagle preview lint ")
"""What a block of `console` may run."""


def _consoles():
    """Each command of a `console` block, where it stands, and what it prints there."""
    for page in pages():
        for block in code_blocks(without_parts(page.read_text(encoding="utf-8"))):
            if block.language == "console":
                for shown in block.body.replace("\\\n", " ").split("$ ")[1:]:
                    command, _, output = shown.partition("\n")
                    marks = pytest.mark.slow if page.name == "planner.md" else ()  # ten seconds each
                    yield pytest.param(command, output, id=f"{page.name}:{block.line}", marks=marks)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPO)))
def test_shown_commands_are_commands(page):
    assert not list(shown_commands.problems(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize(("command", "output"), _consoles())
def test_cheap_commands_print_what_pages_say(command, output, monkeypatch, capsys):
    assert command.startswith(CHEAP), "too much for a test"
    monkeypatch.chdir(REPO)
    assert not table.main(shlex.split(command, comments=True)[1:])
    assert _same(output, capsys.readouterr().out)


def test_another_output_is_noticed():
    assert _same("a  b\n...\nlast\n", "a b\nmuch\nlast\n")
    assert not _same("a  b\n...\nlast\n", "a c\nmuch\nlast\n")


def _same(expected: str, got: str) -> bool:
    return doctest.OutputChecker().check_output(
        expected, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )


@pytest.mark.parametrize(
    "command",
    [
        "python tools/pack_data.py --data D --length N --seed 0",
        "python tools/train.py replay RUN --iteration N optimizer.lr=1e-5  # a comment",
        "torchrun --nproc-per-node N tools/train.py run --config FILE a.b=c",
        "A=b python -m tests.stamps all test",
        "sbatch --account=A examples/slurm/train.sbatch run.yaml optimizer.lr=1e-5",
        "pip install -e '.[gpu,dali]'",
        "make demo TORCH_INDEX=URL && make test",
        "tools/serve_vllm.sh H &",
        "megatron-eagle --help && megatron-eagle pack --data D --length N",
        "torchrun --nproc-per-node N -m megatron_eagle train run --config FILE a.b=c",
        "torchrun --nproc-per-node N --no-python megatron-eagle train run --config FILE",
    ],
)
def test_what_is_right_passes(command):
    assert not list(shown_commands.problems(f"```bash\n{command}\n```"))


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("python tools/pack_data.py --data D --length N --sead 0", "unrecognized arguments: --sead 0"),
        ("python tools/pack_data.py --data D", "the following arguments are required: --length"),
        ("python tools/pack_data.py --data D --length many", "argument --length: invalid int value: 'many'"),
        ("python tools/missing.py", "no file tools/missing.py"),
        ("python tools/train.py walk", "invalid choice: 'walk'"),
        (
            "python tools/preview_data.py lint examples/demo/missing.yaml",
            "no file examples/demo/missing.yaml",
        ),
        ("python -m tests.missing", "no module tests.missing"),
        ("torchrun --nprocs 2 tools/train.py run --config F", "--nprocs"),
        ("torchrun --nproc-per-node 2 tools/train.py run --conf", "argument --config: expected one argument"),
        ("sbatch examples/slurm/convert.sbatch import --hf H", "arguments are required: --checkpoint"),
        ("pip install -e '.[gpus]'", "setup.py has no extra gpus"),
        ("make demos", "the Makefile has no demos"),
        ("make demo TORCHINDEX=URL", "the Makefile has no TORCHINDEX=URL"),
        ("megatron-eagle fly", "no command fly"),
        ("megatron-eagle pack --data D", "the following arguments are required: --length"),
        ("torchrun -m megatron_eagle train run --conf", "argument --config: expected one argument"),
        ("megatron-hawk train", "what is megatron-hawk?"),
    ],
)
def test_faults_are_noticed(command, problem):
    (found,) = set(shown_commands.check(command)) - {f"no file {command.split()[-1]}"} or {
        f"no file {command.split()[-1]}"
    }
    assert problem in found


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```\nmake demo\n```", "a block of nothing"),
        ("say `make demos`", "the Makefile has no demos"),
        ("say `tools/train.py run --configs F`", "--configs is no flag"),
        ("say `python tools/missing.py run`", "no such file"),
        ("say `megatron-eagle fly`", "no command fly"),
        ("say `megatron-eagle pack --dates D`", "--dates is no flag"),
        ("say `--max-tocens`", "--max-tocens is no flag"),
    ],
)
def test_faults_of_blocks_and_spans_are_noticed(text, problem):
    (found,) = shown_commands.problems(text)
    assert problem in found


def test_a_parser_is_caught_before_anything_runs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import argparse\n"
        "parser = argparse.ArgumentParser(description='Does it.')\n"
        "parser.add_argument('--size', type=int, default=3, help='of it (default %(default)s)')\n"
        "parser.parse_args()\n"
        "raise SystemExit('ran')\n"
    )
    parser = commands.parser_of(script)
    assert commands.flags(parser) == {"-h", "--help", "--size"}
    script.with_name("none.py").write_text("")
    with pytest.raises(ValueError, match="does not parse"):
        commands.parser_of(script.with_name("none.py"))


def test_the_reference_has_every_tool():
    tools = set((REPO / "tools").glob("*.py"))
    assert tools == {*commands.scripts().values(), commands.BENCH}
