"""Where training calls a collective: the call's text, the functions around it, the module and the phase.

Names hold no line numbers, so that they survive edits elsewhere in a file.
"""

import ast
import linecache
import sys
from pathlib import Path
from types import CodeType, FrameType
from weakref import WeakKeyDictionary

import megatron.core
import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from tests.paths import REPO

# Sources that take part in a training step, by the name that their files have here.
ROOTS = {
    str(REPO / "megatron_eagle"): "megatron_eagle",
    str(REPO / "kernels" / "eagle_kernels"): "eagle_kernels",
    str(Path(megatron.core.__file__).parent): "megatron/core",
}
# Of them, what only stands between a caller and torch.
_PLUMBING = "megatron_eagle/runtime/megatron_cpu.py"
_TESTS, _HERE = str(REPO / "tests"), str(Path(__file__).parent)
# A chain of callers ends where the training step begins, or what is built before it.
_STEP = tuple(
    f"megatron_eagle/training/{name}.py"
    for name in ("trainer", "forward_backward", "schedule", "monitoring/observer")
)
_DRIVERS = (*_STEP, "megatron_eagle/training/setup.py", "megatron_eagle/training/train.py")
_CHECKPOINTS = "megatron_eagle/checkpoint/"
SET_UP = "set-up"  # and whatever else is no part of a step


def short_name(file: str) -> str | None:
    """`file` below its root, or None: no source of a training step."""
    for root, name in ROOTS.items():
        if file.startswith(root + "/"):
            short = name + file[len(root) :]
            return None if short == _PLUMBING else short
    return None


def current_phase(frame: FrameType) -> str:
    """The part of a training step that `frame` belongs to, or `SET_UP`."""
    if torch._C._current_graph_task_id() != -1:
        return "backward"
    while frame is not None:
        code, file = frame.f_code, short_name(frame.f_code.co_filename)
        if file is not None:
            if file.startswith(_CHECKPOINTS):
                return SET_UP
            if code.co_name.endswith("finalize_model_grads"):
                return "finalisation"
            if file.endswith("pipeline_parallel/p2p_communication.py"):
                return "pipeline"
            owner = frame.f_locals.get("self")
            if code.co_name == "forward_step" or (
                code.co_name == "forward" and isinstance(owner, torch.nn.Module)
            ):
                return "forward"
            if code.co_name != "__init__" and isinstance(owner, MegatronOptimizer | OptimizerParamScheduler):
                return "optimizer step"
            if file in _STEP:
                return "step"
        frame = frame.f_back
    return SET_UP


class Sites:
    """Names call sites; knows the modules of models that were wrapped, and which call made a graph's node."""

    def __init__(self) -> None:
        self._modules: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()

    def learn(self, model: torch.nn.Module) -> None:
        """Remember the modules' names, without the numbers of layers."""
        for name, module in model.named_modules():
            words = ["*" if word.isdigit() else word for word in name.split(".") if word != "module"]
            self._modules[module] = ".".join(words) or type(module).__name__

    def name(self, frame: FrameType, kind: str) -> str | None:
        """Of the collective that `frame` is inside of; None if it is not training's."""
        chain = self.chain(frame)
        if chain is None:
            return None
        call, functions, module = chain
        place = " < ".join(functions) + (f" of {module}" if module else "")
        return f"{current_phase(frame)}: {kind} by {call} in {place}"

    def chain(self, frame: FrameType | None) -> tuple[str, list[str], str] | None:
        """(text of the innermost call, functions around it from the inside, module that they end in)."""
        call, functions = None, []
        while frame is not None:
            code = frame.f_code
            file = short_name(code.co_filename)
            if file in _DRIVERS:
                break
            if call is None and _is_of_a_test(code.co_filename):
                return None
            if file is not None:
                call = call or f"{Path(file).name} {_call_text(frame)}"
                functions.append(code.co_qualname.replace(".<locals>", ""))
                owner, node = frame.f_locals.get("self"), frame.f_locals.get("ctx")
                if isinstance(owner, torch.nn.Module):
                    return call, functions, self._modules.get(owner, type(owner).__name__)
                if code.co_name == "backward" and getattr(node, "made_by", None):
                    made_by, module = node.made_by
                    return call, functions + made_by, module
            frame = frame.f_back
        return None if call is None else (call, functions, "")

    def tag(self, output, frame: FrameType) -> None:
        """Let the graph's node of an autograd function's `output` remember who called the function."""
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor) and first.grad_fn is not None:
            chain = self.chain(frame)
            if chain is not None:
                first.grad_fn.made_by = chain[1:]


def _is_of_a_test(file: str) -> bool:
    return file.startswith(_TESTS) and not file.startswith(_HERE)


_texts: dict[tuple[CodeType, int], str] = {}


def _call_text(frame: FrameType) -> str:
    """The source of the call that `frame` is at, in one line."""
    key = frame.f_code, frame.f_lasti
    if key not in _texts:
        start, end, column, end_column = list(frame.f_code.co_positions())[frame.f_lasti // 2]
        lines = [linecache.getline(frame.f_code.co_filename, n).encode() for n in range(start, end + 1)]
        lines[-1] = lines[-1][:end_column]
        lines[0] = lines[0][column:]
        text = b"".join(lines).decode()
        try:
            _texts[key] = ast.unparse(ast.parse(text.strip(), mode="eval"))
        except SyntaxError:  # the end of a with statement
            _texts[key] = text.split("\n")[0].strip()
    return _texts[key]


def caller(depth: int) -> FrameType:
    """The frame `depth` calls above the caller's."""
    return sys._getframe(depth + 1)
