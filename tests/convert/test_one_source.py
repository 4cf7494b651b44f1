"""What exports ship is the product's own: the same files, and nothing of them written a second time."""

import ast
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_eagle.hf_model
from tests.paths import REPO

SHIPPED = Path(megatron_eagle.hf_model.__file__).parent
CODE = sorted(path for path in SHIPPED.glob("*.py") if path.name != "__init__.py")
# Those that `auto_map` names.
LOADED = {f"{kind}_eagle2_5_vl" for kind in ("configuration", "modeling", "image_processing", "processing")}
LIBRARIES = {"torch", "transformers", "numpy", "PIL", "av"}
# Parts of a function, and of a value, below which two are alike by chance.
TRIVIAL, ITEMS = 15, 8


def _imports(path: Path) -> tuple[set[str], set[str]]:
    """Neighbours and packages that a file imports."""
    neighbours, packages = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module, (
                f"{path.name}: only `from .neighbour import name` is copied"
            )
            neighbours.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            packages.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            packages |= {name.name.split(".")[0] for name in node.names}
    return neighbours, packages


def test_an_export_has_the_same_files(exported):
    assert {path.name for path in exported.glob("*.py")} == {path.name for path in CODE}
    for path in CODE:
        assert (exported / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.name)
def test_a_shipped_file_stands_alone(path):
    """transformers 4.51 copies what a file that it loads imports, and not what its neighbours import."""
    neighbours, packages = _imports(path)
    assert packages <= LIBRARIES | {"pillow_heif"} | sys.stdlib_module_names  # HEIC, where it is installed
    if path.stem in LOADED:
        for name in neighbours:
            assert _imports(SHIPPED / f"{name}.py")[0] <= neighbours, (path.name, name)


def test_those_that_are_loaded_are_known(exported):
    found = set()
    for file in ("config.json", "preprocessor_config.json", "processor_config.json"):
        found |= {
            name.split(".")[0] for name in json.loads((exported / file).read_text())["auto_map"].values()
        }
    assert found == LOADED


@pytest.mark.parametrize("path", sorted((SHIPPED / "vllm_plugin").glob("*.py")), ids=lambda path: path.name)
def test_the_plugin_needs_no_checkout(path):
    """It knows the export through its processor, and else what is installed beside vLLM."""
    neighbours, packages = _imports(path)
    assert packages <= LIBRARIES | {"vllm", "aiohttp"} | sys.stdlib_module_names  # which vLLM brings
    assert all((path.parent / f"{name}.py").is_file() for name in neighbours)


def _texts(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Texts that a program uses: no docstrings, errors, or names of settings, which two sides share."""
    left_out = (ast.Expr, ast.Raise)
    skipped = {id(part) for node in ast.walk(tree) if isinstance(node, left_out) for part in _parts(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            letters = re.sub(r"\W", "", node.value)
            if len(letters) > 5 and not re.fullmatch(r"[\w.-]+", node.value):
                yield node.value, node.lineno


def _parts(node: ast.Expr | ast.Raise) -> Iterator[ast.AST]:
    return ast.walk(node) if isinstance(node, ast.Raise) else iter([node.value])


def _functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Bodies of functions, without docstrings, whatever their names are."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if sum(1 for statement in body for _ in ast.walk(statement)) >= TRIVIAL:
                yield "\n".join(ast.dump(statement) for statement in body), node.lineno


def _constants(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Values of several items that a file names at its top."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and sum(1 for _ in ast.walk(node.value)) >= ITEMS:
            yield ast.dump(node.value), node.lineno


def _numbers(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Three and more fractions in a list or a tuple."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple) and len(node.elts) > 2:
            values = [part.value for part in node.elts if isinstance(part, ast.Constant)]
            if len(values) == len(node.elts) and all(type(value) is float for value in values):
                yield str(values), node.lineno


def twice(shipped: dict[str, str], product: dict[str, str]) -> list[str]:
    """Texts, functions and constants that stand in a shipped file and again in the product."""
    places: dict[tuple[int, str], list[str]] = defaultdict(list)
    found = []
    for side, files in (("shipped", shipped), ("product", product)):
        for name, source in files.items():
            tree = ast.parse(source)
            for number, kind in enumerate((_texts, _functions, _constants, _numbers)):
                for value, line in kind(tree):
                    key = number, value
                    if side == "shipped":
                        places[key].append(f"{name}:{line}")
                    elif key in places:
                        found.append(f"{name}:{line} has what {places[key][0]} has")
    return found


def test_nothing_is_written_twice():
    product = {
        str(path.relative_to(REPO)): path.read_text()
        for path in sorted((REPO / "megatron_eagle").rglob("*.py"))
        if SHIPPED not in path.parents
    }
    assert twice({path.name: path.read_text() for path in CODE}, product) == []


def test_a_second_writing_is_found():
    shipped = (
        '_NAMES = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "x"]'
    )
    assert twice({"a": shipped}, {"b": shipped.replace("_NAMES", "_OTHER")})
    grid = "def f(a, b):\n    '''A text of its own.'''\n    return [c for c in range(a) if a % c == b]\n"
    assert twice({"a": grid}, {"b": grid.replace("def f", "def g").replace("own", "another")})
    label = "def f(n, t):\n    return f'Frame {n} sample at {t}s'\n"
    assert twice({"a": label}, {"b": "x = ' sample at '"})
    assert twice({"a": "mean = (0.5, 0.5, 0.5)"}, {"b": "x = {'image_mean': [0.5, 0.5, 0.5]}"})
    assert twice({"a": "x = 'min_frames'"}, {"b": "x = 'min_frames'"}) == []
