"""Habits that ruff has no rule for: what is written out plainly, and what nobody calls."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.paths import REPO

FOLDERS = ("megatron_eagle", "kernels/eagle_kernels", "tools", "examples", "tests")


def sources(*folders: str) -> Iterator[tuple[str, str]]:
    """Python files below these folders: path and text."""
    for folder in folders:
        for path in sorted((REPO / folder).rglob("*.py")):
            yield str(path.relative_to(REPO)), path.read_text()


def spread_literals(source: str) -> list[int]:
    """Lines with `*(a, b)`: a tuple or list that is written down and spread at once."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Starred)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Tuple | ast.List)
    ]


def test_no_literal_is_spread_where_it_is_written():
    found = {path: lines for path, text in sources(*FOLDERS) if (lines := spread_literals(text))}
    assert not found, "write the items themselves"


def test_a_spread_literal_is_found():
    assert spread_literals("f(*(a, b), *c)\nx = [\n  *[1, 2],\n  *range(3)]\n*y, z = x\n") == [1, 3]


def parts_in_order(source: str) -> list[int]:
    """Lines that hand a specification's parts to Megatron by their place."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args)
    return [node.lineno for node in calls if ast.unparse(node.func).endswith("Submodules")]


def test_parts_are_handed_to_megatron_by_name():
    """Its versions have them in different orders."""
    found = {path: lines for path, text in sources("megatron_eagle") if (lines := parts_in_order(text))}
    assert not found
    assert parts_in_order("x = MLPSubmodules(one, two)\ny = MLPSubmodules(fc1=one)\n") == [1]


_ALL_ENDS = re.compile(r"read_text\([^()]*\)\.splitlines\(\)|\bin text\.splitlines\(\)")


def test_lines_of_json_end_where_json_lets_them():
    """`str.splitlines` cuts at U+2028 and others that JSON may hold in a line; see `split_lines`."""
    found = {
        f"{path}: {line.strip()}"
        for path, text in sources("megatron_eagle", "tools", "examples")
        for line in text.splitlines()
        if _ALL_ENDS.search(line) and "status" not in line  # Linux' own files
    }
    assert not found, "use megatron_eagle.files.split_lines"


_PROSE = re.compile(r"\bRaises\b(?!:)|\braises?\s+(?:`|\w*(?:Error|Problem)\b)")


def errors_in_prose(source: str) -> int:
    """Docstrings that say what is raised in a sentence, without a section `Raises:`."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return sum(bool(_PROSE.search(ast.get_docstring(node) or "")) for node in nodes)


def test_docstrings_have_a_section_for_errors():
    found = {path for path, text in sources("megatron_eagle", "kernels", "tools") if errors_in_prose(text)}
    assert not found, "write a section `Raises:` (Google style)"


@pytest.mark.parametrize("words", ["Raises `E`", "Raises\n    `E`", "Raises as `g`", "It raises ValueError"])
def test_an_error_in_prose_is_found(words):
    prose = f'def f():\n    """It. {words}."""\n'
    section = 'class C:\n    """It.\n\n    Raises:\n        E: so.\n    """\n'
    assert (errors_in_prose(prose), errors_in_prose(section), errors_in_prose(prose + section)) == (1, 0, 1)
