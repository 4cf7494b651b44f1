"""What setup.py declares, and what the sources of the package import."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tests.paths import REPO

ROOTS = {"megatron_eagle": REPO / "megatron_eagle", "eagle_kernels": REPO / "kernels" / "eagle_kernels"}
"""The packages that are installed, and where they are here."""


def declared() -> dict[str, Any]:
    """The arguments of setup.py's `setup`."""
    path = REPO / "setup.py"
    with patch("setuptools.setup") as setup:
        exec(path.read_text(encoding="utf-8"), {"__name__": "setup", "__file__": str(path)})
    return dict(setup.call_args.kwargs)


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Libraries that a source imports, but for Python's own and ours, and whether that can be done without.

    An import inside of a function, of a `try` or of `if TYPE_CHECKING` is not made by everybody.
    """
    yield from _imports(ast.parse(source), optional=False)


def _imports(node: ast.AST, *, optional: bool) -> Iterator[tuple[str, bool]]:
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        names = [node.module or ""]
    for name in names:
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ROOTS:
            yield top, optional
    inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try | ast.If)
    for child in ast.iter_child_nodes(node):
        yield from _imports(child, optional=optional or inner)


def sources() -> Iterator[Path]:
    """Every Python file that is installed."""
    for root in ROOTS.values():
        yield from sorted(root.rglob("*.py"))
