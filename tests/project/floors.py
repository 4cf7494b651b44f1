"""The floors of docs/architecture.md, from the import contracts that `make lint` checks."""

import ast
import tomllib

from tests.paths import REPO

_PACKAGE = "megatron_eagle."


def floors() -> str:
    """The floors of the package, the highest first, as text."""
    return _ladder(_PACKAGE)


def phases() -> str:
    """The phases of `megatron_eagle/data`, the last first, as text."""
    return _ladder(_PACKAGE + "data.")


def _ladder(prefix: str) -> str:
    """The first contract whose layers are all modules below `prefix`."""
    settings = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
    for contract in settings["tool"]["importlinter"]["contracts"]:
        layers = [layer.split(" | ") for layer in contract.get("layers", ())]
        if layers and all(module.startswith(prefix) for layer in layers for module in layer):
            return _render(layers, prefix)
    raise ValueError(f"pyproject.toml: no contract about the layers of {prefix}")


def _render(layers: list[list[str]], prefix: str) -> str:
    width = max(len(module) for layer in layers for module in layer) - len(prefix) + 2
    lines = []
    for number, layer in zip(range(len(layers), 0, -1), layers, strict=True):
        for place, module in enumerate(layer):
            name = module.removeprefix(prefix)
            lines.append(f"{number if place == 0 else '':>2}  {name:<{width}}{_first_line(module)}")
    return "\n".join(["```text", *lines, "```"])


def _first_line(module: str) -> str:
    path = REPO / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return docstring.partition("\n")[0].rstrip(".")
