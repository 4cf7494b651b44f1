"""Compiles every Triton kernel for GPUs that are not there: `python -m tests.kernels.compiled [80 90 100]`.

Prints JSON: per kernel and architecture, registers, bytes of local memory, load and store instructions that
spill, shared memory, and global loads with how many of them are 128 bits wide. Needs no GPU: triton brings
the compiler and the disassembler.
"""

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eagle_kernels import layer_norm, linear_cross_entropy, rms_norm, rope, swiglu
from eagle_kernels.configurations import ARCHITECTURES, Block

TOKENS = 32768
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
        command = [tool, "-res-usage", "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.search(r"REG:(\d+)", code)[1]),
        "local": int(re.search(r"LOCAL:(\d+)", code)[1]) + int(re.search(r"STACK:(\d+)", code)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "loads": len(re.findall(r"\bLDG\b", code)),
        "wide loads": len(re.findall(r"\bLDG\S*\.128", code)),
    }


def cases(architecture: int) -> list[Case]:
    """Every kernel, bf16, as the table launches it on `architecture` over `TOKENS` tokens, at the widths of
    Eagle2.5-8B's language model (3584, heads of 128) and encoder (1152)."""
    settings = ARCHITECTURES[architecture]
    bf16, fp32, i64, i32 = "*bf16", "*fp32", "*i64", "i32"
    listed = []

    def add(name: str, kernel, block: Block, signature: dict[str, str], **constants: int | bool) -> None:
        listed.append(Case(name, kernel, signature, constants, block.warps))

    step, norm, encoder = settings.rows(TOKENS), settings.norm(3584), settings.norm(1152)
    scalars = dict.fromkeys(("n_rows", "grad_stride", "x_stride", "width"), i32) | {"eps": "fp32"}
    tensors = dict.fromkeys(("GRAD", "X", "WEIGHT", "BIAS", "Y", "GRAD_X"), bf16)
    tensors |= dict.fromkeys(("MEAN", "RSTD", "GRAD_WEIGHT", "GRAD_BIAS"), fp32)
    for name, module, block in (("rms_norm", rms_norm, norm), ("layer_norm", layer_norm, encoder)):
        for way in ("forward", "backward"):
            kernel = getattr(module, f"{way}_kernel")
            add(f"{name} {way}", kernel, block, tensors | scalars, ROWS=step, BLOCK=block.size)
    block = settings.swiglu
    tensors = dict.fromkeys(("GRAD", "GATE_UP", "GRAD_GATE_UP", "Y"), bf16)
    scalars = dict.fromkeys(("n_rows", "grad_stride", "stride", "out_stride", "width"), i32)
    for way in ("forward", "backward"):
        kernel = getattr(swiglu, f"{way}_kernel")
        add(f"swiglu {way}", kernel, block, tensors | scalars, ROWS=step, BLOCK=block.size)
    block = settings.rope
    signature = dict.fromkeys(("X", "COS", "SIN", "Y"), bf16)
    signature |= dict.fromkeys(("n_rows", "n_heads", "row_stride", "head_stride"), i32)
    for way in ("forward", "backward"):
        constants = {"BACKWARD": way == "backward", "HALF": 64, "HEADS": block.size, "ROWS": step}
        add(f"rope {way}", rope.rotate_kernel, block, signature, **constants)
    block, module = settings.cross_entropy, linear_cross_entropy
    signature = {"LOGITS": bf16, "LABELS": i64}
    signature |= dict.fromkeys(("MAXIMUM", "TOTAL", "TARGET", "LSE", "WEIGHTS"), fp32)
    signature |= dict.fromkeys(("stride", "real_rows", "n_columns"), i32)
    add("linear_cross_entropy statistics", module.statistics_kernel, block, signature, BLOCK=block.size)
    add("linear_cross_entropy gradient", module.gradient_kernel, block, signature, BLOCK=block.size)
    return listed


def main() -> None:
    """Compile all for the architectures named, all of the table if none."""
    architectures = [int(word) for word in sys.argv[1:]] or list(ARCHITECTURES)
    with ThreadPoolExecutor(2) as pool:  # most of the time is ptxas', a process of its own
        done = [(f"{c.name} sm_{a}", pool.submit(c.compile, a)) for a in architectures for c in cases(a)]
        print(json.dumps({name: future.result() for name, future in done}, indent=1))


if __name__ == "__main__":
    main()
