"""Megatron's and torch's modules and classes are changed in one file, runtime/megatron_cpu.py."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import REPO

PATCHES = "megatron_eagle/runtime/megatron_cpu.py"
FOREIGN = ("megatron", "torch")
# (file, what is changed): why.
ALLOWED = {
    (
        "megatron_eagle/rehearsal/patches.py",
        "setattr(owner, name, replacement)",
    ): "in a process that only rehearses or is recorded, taken off again",
    (
        "megatron_eagle/runtime/determinism.py",
        "torch.backends.cudnn.benchmark",
    ): "torch offers it",
    (
        "megatron_eagle/runtime/determinism.py",
        "torch.utils.deterministic.fill_uninitialized_memory",
    ): "torch offers it",
    (
        "megatron_eagle/runtime/torchrun.py",
        "api._terminate_process_handler",
    ): "in torchrun's own process, which has no model: signals after the first are not errors",
    (
        "megatron_eagle/runtime/torchrun.py",
        "SimpleElasticAgent._exit_barrier",
    ): "the same: a signal ends its wait for other nodes, which is in C++ and up to five minutes long",
    ("tools/benchmarks/step_clock.py", "patch.object(module, attribute, timed)"): (
        "a stopwatch around the communication of the step that is measured, taken off again"
    ),
}


def patches(source: str) -> set[str]:
    """What a program changes of Megatron and torch, and every change of an attribute by a name in a variable.

    Followed are imported names and what is read of them into a variable; not instances that are made of them.
    """
    tree = ast.parse(source)
    foreign = set(_imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and _root(node.value) in foreign:
            foreign |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {
        ast.unparse(node)
        for node in ast.walk(tree)
        if _is_written_attribute(node, foreign) or _is_setter(node)
    }


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] in FOREIGN:
                    yield name.asname or name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            yield from (name.asname or name.name for name in node.names)


def _root(node: ast.expr) -> str | None:
    """The name that a chain of attributes begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _is_written_attribute(node: ast.AST, foreign: set[str]) -> bool:
    written = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del)
    return written and _root(node) in foreign


def _is_setter(node: ast.AST) -> bool:
    """A call that changes an attribute: whose, cannot be read from it."""
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func)
    return name in ("setattr", "delattr") or name.split(".")[-1] == "patch" or ".patch." in f".{name}"


def found() -> set[tuple[str, str]]:
    """(file, what is changed) of all programs but the one that may."""
    return {
        (name, patch)
        for folder in ("megatron_eagle", "kernels", "tools", "examples")
        for path in sorted((REPO / folder).rglob("*.py"))
        if (name := str(path.relative_to(REPO))) != PATCHES
        for patch in patches(path.read_text(encoding="utf-8"))
    }


def test_only_one_file_patches():
    assert found() == set(ALLOWED)


def test_the_one_file_is_seen():
    assert patches(Path(REPO / PATCHES).read_text(encoding="utf-8")) >= {
        "optimizer_class.state_dict",
        "setattr(owner, name, replacement)",
    }


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.current_device = lambda: 0",
        "import torch.distributed as dist\ndist.all_reduce = None",
        "from megatron.core.optimizer import DistributedOptimizer\nDistributedOptimizer.step = print",
        "def f():\n    from megatron import core\n    kind = core.models.GPTModel\n    kind.forward = print",
        "from megatron.core import parallel_state\ndel parallel_state.get_rank",
        "import torch\nsetattr(torch, 'compile', None)",
        "from unittest import mock\nmock.patch('torch.compile')",
        "from unittest.mock import patch\nwith patch.object(owner, 'name', None): pass",
    ],
)
def test_a_patch_is_noticed(source):
    assert patches(source)


def test_instances_are_no_modules():
    source = "import torch\nweight = torch.ones(1)\nweight.main_grad = None\nself.torch = torch.float32"
    assert patches(source) == set()
