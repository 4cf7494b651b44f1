"""Compiles every Triton kernel for GPUs that are not there: `python -m tests.kernels.compiled [90 100]`.

Prints JSON: per kernel and architecture, registers, bytes of local memory, load and store instructions that
spill, shared memory, and global loads with how many of them are 128 bits wide. Needs no GPU: triton brings
the compiler and the disassembler.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eagle_kernels import layer_norm, linear_cross_entropy, rms_norm, rope, swiglu
from eagle_kernels.dispatch import warps

_TENSORS = {"*bf16", "*fp32", "*i64"}


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its arguments and the constants it runs with at Eagle 2.5's shapes."""

    name: str
    kernel: object
    signature: dict[str, str]
    constants: dict[str, int | bool]
    num_warps: int

    def compile(self, architecture: int) -> dict:
        """-> what the compiler made of it."""
        names = self.kernel.arg_names
        signature = {name: self.signature.get(name, "constexpr") for name in names}
        # As at run time: pointers, strides and widths are multiples of 16.
        aligned = [
            i
            for i, name in enumerate(names)
            if signature[name] in _TENSORS or name.endswith(("stride", "width", "columns"))
        ]
        source = ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in self.constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )
        target = GPUTarget("cuda", architecture, 32)
        binary = triton.compile(source, target=target, options={"num_warps": self.num_warps})
        return _resources(binary.asm["cubin"]) | {"shared": binary.metadata.shared}


def _resources(cubin: bytes) -> dict:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads": len(re.findall(r"\bLDG\b", code)),
        "wide loads": len(re.findall(r"\bLDG\S*\.128", code)),
    }


def cases() -> list[Case]:
    """Every kernel, bf16, as at the language model's widths (3584, heads of 128) and the tower's (1152)."""
    bf16, fp32, i64, i32 = "*bf16", "*fp32", "*i64", "i32"
    listed = []
    for residual in (False, True):
        forward = dict.fromkeys(("X", "RESIDUAL", "WEIGHT", "SUM", "Y"), bf16) | {"RSTD": fp32, "eps": "fp32"}
        forward |= dict.fromkeys(("n_rows", "x_stride", "residual_stride", "width"), i32)
        backward = dict.fromkeys(("GRAD", "GRAD_SUM", "X", "WEIGHT", "GRAD_X"), bf16)
        backward |= {"RSTD": fp32, "GRAD_WEIGHT": fp32}
        backward |= dict.fromkeys(("n_rows", "grad_stride", "x_stride", "width"), i32)
        constants = {"HAS_RESIDUAL": residual, "ROWS": 16, "BLOCK": 4096}
        suffix = ", residual" * residual
        listed += [
            Case(f"rms_norm forward{suffix}", rms_norm.forward_kernel, forward, constants, warps(4096)),
            Case(f"rms_norm backward{suffix}", rms_norm.backward_kernel, backward, constants, warps(4096)),
        ]
    constants = {"ROWS": 16, "BLOCK": 2048}
    forward = dict.fromkeys(("X", "WEIGHT", "BIAS", "Y"), bf16) | {"MEAN": fp32, "RSTD": fp32, "eps": "fp32"}
    forward |= dict.fromkeys(("n_rows", "x_stride", "width"), i32)
    backward = dict.fromkeys(("GRAD", "X", "WEIGHT", "GRAD_X"), bf16)
    backward |= dict.fromkeys(("MEAN", "RSTD", "GRAD_WEIGHT", "GRAD_BIAS"), fp32)
    backward |= dict.fromkeys(("n_rows", "grad_stride", "x_stride", "width"), i32)
    listed += [
        Case("layer_norm forward", layer_norm.forward_kernel, forward, constants, warps(2048)),
        Case("layer_norm backward", layer_norm.backward_kernel, backward, constants, warps(2048)),
    ]
    constants = {"ROWS": 16, "BLOCK": 1024}
    forward = {"GATE_UP": bf16, "Y": bf16} | dict.fromkeys(("n_rows", "stride", "width"), i32)
    backward = dict.fromkeys(("GRAD", "GATE_UP", "GRAD_GATE_UP"), bf16)
    backward |= dict.fromkeys(("n_rows", "grad_stride", "stride", "out_stride", "width"), i32)
    listed += [
        Case("swiglu forward", swiglu.forward_kernel, forward, constants, 4),
        Case("swiglu backward", swiglu.backward_kernel, backward, constants, 4),
    ]
    rotate = {"X": bf16, "COS": fp32, "SIN": fp32, "Y": bf16}
    rotate |= dict.fromkeys(("n_rows", "n_heads", "row_stride", "head_stride"), i32)
    for backwards in (False, True):
        constants = {"BACKWARD": backwards, "HALF": 64, "HEADS": 32, "ROWS": 16}
        name = f"rope {'backward' if backwards else 'forward'}"
        listed.append(Case(name, rope.rotate_kernel, rotate, constants, 4))
    statistics = {"LOGITS": bf16, "LABELS": i64, **dict.fromkeys(("MAXIMUM", "TOTAL", "TARGET"), fp32)}
    statistics |= dict.fromkeys(("stride", "real_rows", "n_columns"), i32)
    gradient = {"LOGITS": bf16, "LABELS": i64, "LSE": fp32, "WEIGHTS": fp32, "twice_z": "fp32"}
    gradient |= dict.fromkeys(("stride", "real_rows", "n_columns"), i32)
    module, constants = linear_cross_entropy, {"BLOCK": 4096}
    return listed + [
        Case("linear_cross_entropy statistics", module.statistics_kernel, statistics, constants, 8),
        Case("linear_cross_entropy gradient", module.gradient_kernel, gradient, constants, 8),
    ]


def main() -> None:
    """Compile all for the architectures named, 90 if none."""
    architectures = [int(word) for word in sys.argv[1:]] or [90]
    print(json.dumps({f"{c.name} sm_{a}": c.compile(a) for a in architectures for c in cases()}, indent=1))


if __name__ == "__main__":
    main()
