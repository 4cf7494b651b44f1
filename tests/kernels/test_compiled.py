"""Every entry of the table of launch settings compiled without a GPU: nothing spills and loads are wide."""

import ast
import json
import os
import subprocess
import sys

import pytest

from eagle_kernels.configurations import ARCHITECTURES
from tests.paths import REPO

pytest.importorskip("triton", reason="triton is not installed")

REGISTERS, SHARED = 168, 64 * 1024  # a thread, a block: at least 12 warps a multiprocessor
# Loads that cannot be 128 bits wide: scalars of a row.
NARROW = {
    "rms_norm backward": 1,
    "layer_norm backward": 2,
    "linear_cross_entropy statistics": 2,
    "linear_cross_entropy gradient": 3,
}


@pytest.fixture(scope="module")
def compiled() -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiled"]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    if "FileNotFoundError" in done.stderr:
        pytest.skip(f"triton lacks its tools: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_is_compiled():
    """What stands under `@jit` in the package is a case of the gate."""
    from tests.kernels.compiled import cases

    written = {
        (path.stem, node.name)
        for path in (REPO / "kernels" / "eagle_kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "jit" for d in node.decorator_list)
    }
    kernels = [case.kernel.fn for case in cases(next(iter(ARCHITECTURES)))]
    assert written == {(kernel.__module__.rpartition(".")[2], kernel.__name__) for kernel in kernels} != set()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_no_kernel_spills(compiled, architecture):
    found = {name: case for name, case in compiled.items() if name.endswith(architecture)}
    assert len(found) == 10
    assert {name: c for name, c in found.items() if c["spills"] or c["local"]} == {}
    assert {name: c for name, c in found.items() if c["registers"] > REGISTERS or c["shared"] > SHARED} == {}


def test_rows_are_read_128_bits_at_a_time(compiled):
    narrow = {name: case["loads"] - case["wide loads"] for name, case in compiled.items()}
    allowed = {name: NARROW.get(name.rsplit(" ", 1)[0], 0) for name in compiled}
    assert {name: count for name, count in narrow.items() if count > allowed[name]} == {}
    assert min(case["wide loads"] for case in compiled.values()) > 0
