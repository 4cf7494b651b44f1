"""Scale factors of the sources, read from their syntax tree; recorded, dropped or doubled in running code.

What counts: every `*`, `/`, `**`, `*=`, `/=` and call of mul, div, dot or mean, in place or not, inside of a
function, whose result is floating-point when it runs: a number, an array or a tensor. Sizes and indices are
integers and do not count. Triton kernels are not Python that runs.

    dropped   a * b: a, or the one of the two with more elements; a / b and a.div(b): a; a ** b: 1;
              dot(a, b): the sum of a; a.mean(): a.sum()
    doubled   twice the result

A module's functions are given the code of its changed source; its file and its names stay as they are.
"""

import ast
import gc
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

from tests.mutants.sites import short_name

_METHODS = {"mul", "mul_", "multiply", "div", "div_", "true_divide", "dot", "mean"}
# Names under which changed code finds its helpers.
HELPER, _SEEN = "_mutants_larger", "_mutants_seen"


def sites(source: str, file: str) -> list[str]:
    """Names of all candidates in `source`, in order; `file` is its short name."""
    tree = _Tree(file, _Left())
    tree.visit(ast.parse(source))
    return list(tree.names)


def changed(source: str, file: str, site: str, how: str) -> ast.Module:
    """The tree of `source` with a factor dropped or doubled; where it runs, `HELPER` must be `larger`.

    Raises:
        KeyError: there is no such site.
    """
    tree = _Tree(file, _Mutated(site, how))
    module = tree.visit(ast.parse(source))
    if site not in tree.names:
        raise KeyError(f"no scale factor {site}")
    return module


def file_of(site: str) -> str:
    """The file that `site` lies in, below its root."""
    return site.split(" ", 1)[0]


def modules() -> Iterator[tuple[str, ModuleType]]:
    """(short file name, module) of everything imported that may take part in a training step."""
    for module in list(sys.modules.values()):
        file = short_name(getattr(module, "__file__", None) or "")
        if file is not None and file.endswith(".py"):
            yield file, module


def instrument(seen: Callable[[str, bool], None]) -> None:
    """From now on, `seen(site, whether its result is floating-point)` is called whenever a candidate runs."""

    def pass_on(name: str, result: Any) -> Any:
        seen(name, _is_floating(result))
        return result

    codes = {}
    for file, module in modules():
        tree = _Tree(file, _Recorded()).visit(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
        codes |= _codes(tree, module)
        setattr(module, _SEEN, pass_on)
    _give(codes)


def mutate(site: str, how: str) -> Callable[[], None]:
    """Drop or double the factor `site` in the code of this process; returns what undoes it.

    Raises:
        KeyError: there is no such site.
    """
    module = next(module for file, module in modules() if file == file_of(site))
    source = Path(module.__file__).read_text(encoding="utf-8")
    codes = _codes(changed(source, file_of(site), site, how), module)
    setattr(module, HELPER, larger)
    before = _give(codes)

    def undo() -> None:
        for function, code in before:
            function.__code__ = code

    return undo


class _Left:
    """Candidates stay as they are."""

    def expression(self, name: str, node: ast.expr) -> ast.expr:
        return node

    def assignment(self, name: str, node: ast.AugAssign) -> ast.stmt | list[ast.stmt]:
        return node


class _Recorded(_Left):
    """Candidates hand their results on through `_SEEN`."""

    def expression(self, name, node):
        return _call(_SEEN, ast.Constant(name), node)

    def assignment(self, name, node):
        target = ast.parse(ast.unparse(node.target), mode="eval").body  # to be read
        return [node, ast.Expr(_call(_SEEN, ast.Constant(name), target))]


@dataclass(frozen=True)
class _Mutated(_Left):
    """One candidate is dropped or doubled."""

    site: str
    how: str

    def expression(self, name, node):
        if name != self.site:
            return node
        return _dropped(node) if self.how == "dropped" else _doubled(node)

    def assignment(self, name, node):
        if name == self.site:
            node.value = (
                _second(node.value, ast.Constant(1))
                if self.how == "dropped"
                else ast.BinOp(node.value, node.op, ast.Constant(2))
            )
        return node


class _Tree(ast.NodeTransformer):
    """Finds and names the candidates of a file, and puts what `change` says in their places."""

    def __init__(self, file: str, change: _Left) -> None:
        self._file, self._change = file, change
        self._scopes: list[str] = []
        self._functions = 0
        self._counts: Counter[str] = Counter()
        self.names: dict[str, None] = {}

    def visit_FunctionDef(self, node):
        is_kernel = any(isinstance(d, ast.Name) and d.id == "jit" for d in node.decorator_list)
        return node if is_kernel else self._inside(node, True)

    def visit_Lambda(self, node):
        return self._inside(node, True)

    def visit_ClassDef(self, node):
        return self._inside(node, False)

    def visit_BinOp(self, node):
        return self._candidate(node, isinstance(node.op, ast.Mult | ast.Div | ast.Pow))

    def visit_Call(self, node):
        return self._candidate(node, isinstance(node.func, ast.Attribute) and node.func.attr in _METHODS)

    def visit_AugAssign(self, node):
        if not (self._functions and isinstance(node.op, ast.Mult | ast.Div)):
            return self.generic_visit(node)
        name = self._name(node)
        changed = self._change.assignment(name, self.generic_visit(node))
        statements = changed if isinstance(changed, list) else [changed]
        return [_at(statement, node) for statement in statements]

    def _inside(self, node, is_function: bool):
        self._scopes.append(getattr(node, "name", "<lambda>"))
        self._functions += is_function
        self.generic_visit(node)
        self._scopes.pop()
        self._functions -= is_function
        return node

    def _candidate(self, node, counts: bool):
        if not (counts and self._functions):
            return self.generic_visit(node)
        name = self._name(node)
        return _at(self._change.expression(name, self.generic_visit(node)), node)

    def _name(self, node) -> str:
        name = f"{self._file} {'.'.join(self._scopes)}: {ast.unparse(node)}"
        self._counts[name] += 1
        if self._counts[name] > 1:
            name += f" (number {self._counts[name]})"
        self.names[name] = None
        return name


def _doubled(node: ast.BinOp | ast.Call) -> ast.expr:
    if isinstance(node, ast.Call) and node.func.attr.endswith("_"):
        return ast.Call(ast.Attribute(node, "mul_", ast.Load()), [ast.Constant(2)], [])
    return ast.BinOp(ast.Constant(2), ast.Mult(), node)


def _dropped(node: ast.BinOp | ast.Call) -> ast.expr:
    if isinstance(node, ast.Call):
        receiver, method = node.func.value, node.func.attr
        of_module = isinstance(receiver, ast.Name) and receiver.id in ("torch", "np")
        first = node.args[0] if of_module else receiver
        if method == "mean":
            return ast.Call(ast.Attribute(receiver, "sum", ast.Load()), node.args, node.keywords)
        return ast.Call(ast.Attribute(first, "sum", ast.Load()), [], []) if method == "dot" else first
    if isinstance(node.op, ast.Pow):
        return ast.BinOp(node, ast.Pow(), ast.Constant(0))
    if isinstance(node.op, ast.Div):
        return _second(node.right, node.left)
    if isinstance(node.left, ast.Constant):
        return _second(node.left, node.right)
    return _call(HELPER, node.left, node.right)


def larger(left: Any, right: Any) -> Any:
    """The operand that the other one scales: the one with more elements, or the left."""
    sizes = [value.numel() if isinstance(value, torch.Tensor) else np.size(value) for value in (left, right)]
    return right if sizes[1] > sizes[0] else left


def _is_floating(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    return isinstance(value, float) or (
        isinstance(value, np.ndarray | np.generic) and value.dtype.kind == "f"
    )


def _second(first: ast.expr, second: ast.expr) -> ast.expr:
    """`second`, after `first` was computed: what the functions around them refer to stays the same."""
    return ast.Subscript(ast.Tuple([first, second], ast.Load()), ast.Constant(1), ast.Load())


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


def _at(node, place):
    return ast.fix_missing_locations(ast.copy_location(node, place))


def _codes(tree: ast.Module, module: ModuleType) -> dict[tuple, CodeType]:
    """The code of all functions of a changed source, by file, name and first line. Lambdas of one line
    cannot be told apart and are left alone."""
    found, left = defaultdict(list), [compile(tree, module.__file__, "exec", dont_inherit=True)]
    while left:
        for constant in left.pop().co_consts:
            if isinstance(constant, CodeType):
                found[_key(constant)].append(constant)
                left.append(constant)
    return {key: codes[0] for key, codes in found.items() if len(codes) == 1}


def _key(code: CodeType) -> tuple:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def _give(codes: dict[tuple, CodeType]) -> list[tuple[FunctionType, CodeType]]:
    """Every function that has an entry gets its code; returns the functions with the code they had."""
    before = []
    for function in gc.get_objects():
        if type(function) is FunctionType:
            code = codes.get(_key(function.__code__))
            if code is not None and code.co_freevars == function.__code__.co_freevars:
                before.append((function, function.__code__))
                function.__code__ = code
    return before
