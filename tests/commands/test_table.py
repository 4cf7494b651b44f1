"""`megatron-eagle`: its list of commands, each one's flags by both doors, and what each imports."""

import subprocess
import sys

import pytest

from megatron_eagle import __version__
from megatron_eagle.commands.table import COMMANDS, main
from megatron_eagle.errors import UserError
from tests.paths import REPO
from tests.project.commands import flags, parser_of, parser_of_command, scripts

# What a command does not import before it knows what it is asked for.
LIGHT = {
    "torch": ("preprocess", "pack", "preview", "plan", "convert", "train"),
    "megatron": tuple(COMMANDS),
    "eagle_kernels": tuple(COMMANDS),
}


def imported_by(*words: str) -> tuple[str, set[str]]:
    """What `megatron-eagle` prints in a fresh process, and the libraries that it imported."""
    source = (
        "import sys\n"
        "from megatron_eagle.commands.table import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    command = [sys.executable, "-W", "ignore", "-c", source, *words]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    return done.stdout, set(done.stderr.split())


def test_help_lists_the_commands_in_order_and_imports_nothing():
    text, libraries = imported_by("--help")
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ") and "-" not in line[:4]]
    assert listed == list(COMMANDS)
    heavy = {"torch", "numpy", "pyarrow", "transformers", "megatron", "av", "PIL"}
    assert not libraries & heavy


def test_every_module_is_a_command():
    modules = {path.stem for path in (REPO / "megatron_eagle" / "commands").glob("*.py")}
    parts = {"__init__", "rehearse", "remote_options", "server_options", "table"}  # of train, of several
    assert modules - parts == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_takes(name):
    parser = parser_of_command(name, f"megatron-eagle {name}")
    text = parser.format_help()
    assert f"usage: megatron-eagle {name} " in text and "%(prog)" not in text
    assert flags(parser) == flags(parser_of(scripts()[name])) > {"-h", "--help"}


def test_what_a_command_imports():
    *_, libraries = imported_by("pack", "--help")
    assert "pyarrow" in libraries, "this would see nothing"
    for name in LIGHT["torch"]:
        _, libraries = imported_by(name, "--help")
        assert not libraries & {library for library, names in LIGHT.items() if name in names}, name


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_megatron(name):
    _, libraries = imported_by(name, "--help")
    assert not libraries & {library for library, names in LIGHT.items() if name in names}


def test_without_a_command(capsys):
    assert main([]) == 2
    printed = capsys.readouterr()
    assert not printed.out and "  preprocess " in printed.err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert not ended.value.code and capsys.readouterr().out == f"megatron-eagle {__version__}\n"


@pytest.mark.parametrize(
    ("name", "hint"), [("trian", "did you mean 'train'?"), ("fly", "there are preprocess, pack, ")]
)
def test_an_unknown_command_is_one_line(name, hint):
    with pytest.raises(UserError, match=f"^megatron-eagle: no command '{name}'; ") as refused:
        main([name])
    assert hint in str(refused.value) and "\n" not in str(refused.value)


def test_a_library_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "megatron_eagle.commands.serve", raising=False)
    with pytest.raises(UserError, match=r"serve needs uvicorn: pip install 'megatron-eagle\[serve\]'$"):
        main(["serve", "--help"])


def test_a_status_and_an_error_pass_through(tmp_path, capsys):
    with pytest.raises(UserError, match="is no token store"):
        main(["pack", "--data", str(tmp_path), "--length", "8"])
    lines = tmp_path / "lines.jsonl"
    lines.write_text("no JSON\n")
    assert main(["preview", "lint", str(lines), "--no-media"]) == 1
    assert "1 lines, 1 with a problem" in capsys.readouterr().out
