"""Habits that ruff has no rule for: what is written out plainly, and what nobody calls."""

import ast
from collections.abc import Iterator

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
