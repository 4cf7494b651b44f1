"""One meaning per name: no public class, function, type or constant of the product is defined twice."""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_eagle", "kernels/eagle_kernels")

# Names that may be defined in several files, and why.
SHARED = {
    "T": "the type variable",
    "forward_kernel": "every Triton file names its two kernels so; no other file imports them",
    "backward_kernel": "every Triton file names its two kernels so; no other file imports them",
    "main": "every command has one; only the table and its door import it",
    "build_parser": "every command has one; only its own main and the reference ask for it",
    "load_image": "the exported folder stands alone",
}


def _defined(source: str) -> Iterator[str]:
    """Public names that a file defines at its top."""
    for node in ast.parse(source).body:
        names = []
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [n.id for target in targets for n in ast.walk(target) if _is_set(n)]
        yield from (name for name in names if not name.startswith("_"))


def _is_set(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def twice(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Names that several files define: by file, its text."""
    places = defaultdict(list)
    for file, source in sources.items():
        for name in dict.fromkeys(_defined(source)):
            places[name].append(file)
    return {name: files for name, files in places.items() if len(files) > 1}


@pytest.fixture(scope="module")
def product() -> dict[str, str]:
    """Every file of the product by its path, and its text."""
    files = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return {str(path.relative_to(ROOT)): path.read_text() for path in files}


def test_a_name_means_one_thing(product):
    found = {name: files for name, files in twice(product).items() if name not in SHARED}
    assert not found, f"rename all but one, or give a reason in SHARED: {found}"


def test_the_reasons_are_needed(product):
    assert SHARED.keys() <= twice(product).keys()


def test_a_second_meaning_is_found():
    one = "class Plan: ...\n\ndef write(): ...\n\nA, B = 1, 2\n_C = 3\n"
    other = "Plan = int | str\nB: int = 4\n_C = 5\n_C[A] = 1\n\nclass Other:\n    def write(self): ...\n"
    assert twice({"one": one, "other": other}) == {"Plan": ["one", "other"], "B": ["one", "other"]}
