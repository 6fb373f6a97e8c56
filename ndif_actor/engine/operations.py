"""The operations inside of a module's forward: their names, and how each is seen while it runs.

A forward of transformers' own is compiled anew from its source, so that each call in it, and each
binary operator, goes through a callback that sees its inputs and its output and may replace them.
Nothing else changes: decorators, defaults and globals stay those of the original. Only code of the
library is ever compiled, never anything a user sent.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import CellType, FunctionType, MethodType
from typing import Any

import msgspec
import torch

from ndif_actor.engine import leaves
from ndif_client.wire.graph import Port

#: Told of an operation's name, which side of it, and what is there; returns what it becomes, or
#: None if it stays.
Watch = Callable[[str, Port, Any], Any]

#: Whose forwards are rewritten.
_LIBRARY = "transformers"

_BINARY: dict[type[ast.operator], tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("add", operator.add),
    ast.Sub: ("sub", operator.sub),
    ast.Mult: ("mul", operator.mul),
    ast.MatMult: ("matmul", operator.matmul),
    ast.Div: ("div", operator.truediv),
    ast.FloorDiv: ("floordiv", operator.floordiv),
    ast.Mod: ("mod", operator.mod),
    ast.Pow: ("pow", operator.pow),
    ast.BitAnd: ("and", operator.and_),
    ast.BitOr: ("or", operator.or_),
    ast.BitXor: ("xor", operator.xor),
}

#: Calls that look at the frame they stand in, which would be another one.
_FRAME_DEPENDENT = {"locals", "vars", "eval", "exec", "dir"}

#: Decorators and wrappers around a forward are looked through to this depth.
_MAX_WRAPPERS = 6

#: What a rewritten forward calls; no name of Python's own or of the library's looks like it.
_OPERATE = "__ndif_operate"


class Unoffered(Exception):
    """A module's forward can't be looked into; the message says why."""


class Operation(msgspec.Struct, frozen=True):
    """One call or binary operator in a forward.

    Attributes:
        name: unique in the forward, see `Rewritten`.
        line: in the forward's source, from 0.
        attribute: of a call like `x.transpose(...)`, "transpose"; else "".
        function: what a binary operator does; None for a call.
    """

    name: str
    line: int
    attribute: str = ""
    function: Callable[[Any, Any], Any] | None = None


class Rewritten:
    """A forward whose operations can be watched.

    A call is named by the last part of what it calls, a call on `self` by all of it, a binary
    operator as in the `operator` module; then follows its number among those of the same name, in
    the order of evaluation: `apply_rotary_pos_emb_0`, `transpose_2`, `self_q_proj_0`, `add_1`.
    Python's builtins are no operations, nor is what changes a tensor in place (`x.add_(y)`,
    `x += y`): its output is a tensor that others hold.

    Attributes:
        source: its text, as it stands in the library.
        operations: in the order of evaluation.
    """

    def __init__(self, function: FunctionType) -> None:
        tree, lines, first = _parse(function)
        self.source = "".join(lines)
        self._function = function
        found = _Operations()
        definition = tree.body[0]
        assert isinstance(definition, ast.FunctionDef)
        _check(definition)
        self._decorators = len(definition.decorator_list)
        definition.body = [found.visit(statement) for statement in definition.body]
        self.operations: tuple[Operation, ...] = tuple(found.operations)
        self._make = _compiled(definition, function, first)

    def watched(self, watch: Watch, names: Collection[str] | None = None) -> FunctionType:
        """Return the function with its operations watched.

        Args:
            watch: told of each.
            names: of those it is told of; None for all.
        """
        made = self._make(_operate(self.operations, watch, names))
        original = self._function
        made.__defaults__ = original.__defaults__
        made.__kwdefaults__ = original.__kwdefaults__
        made.__qualname__ = original.__qualname__
        made.__module__ = original.__module__
        return made


def find(module: torch.nn.Module) -> Rewritten:
    """Return the forward of a module, rewritten; compiled once for each class.

    Raises:
        Unoffered: it is not of the library, or can't be rewritten faithfully.
    """
    kind = type(module)
    innermost = inspect.unwrap(kind.forward)
    home = getattr(innermost, "__module__", None) or ""
    if not isinstance(innermost, FunctionType) or home.partition(".")[0] != _LIBRARY:
        raise Unoffered(f"the forward of {kind.__name__} is not code of transformers")
    found = _rewritten(innermost)
    if innermost.__name__ != "forward":
        found = "a decorator hides it"
    elif _exchanged(module.forward, innermost, innermost) is None:
        found = "something else runs it"
    if isinstance(found, str):
        raise Unoffered(f"the forward of {kind.__name__} can't be looked into: {found}")
    return found


@contextmanager
def watching(
    module: torch.nn.Module, watch: Watch, names: Collection[str] | None = None
) -> Iterator[None]:
    """Within the block, the module's forward tells `watch` of its operations.

    Args:
        module: only this one; others of its class stay as they are.
        watch: what is told.
        names: of the operations it is told of; None for all.

    Raises:
        Unoffered: see `find`.
    """
    rewritten = find(module)
    innermost = inspect.unwrap(type(module).forward)
    forward = _exchanged(module.forward, innermost, rewritten.watched(watch, names))
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


# ---------------------------------------------------------------- running


def _operate(
    operations: tuple[Operation, ...], watch: Watch, names: Collection[str] | None
) -> Callable[..., Any]:
    """Return what stands in for every operation of a forward."""

    def operate(number: int, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        operation = operations[number]
        if callee is None:
            callee = operation.function
        if names is not None and operation.name not in names:
            return callee(*args, **kwargs)
        # The tensor whose method is called is an input like the others, as in torch.transpose(x).
        of_tensor = operation.attribute and isinstance(
            getattr(callee, "__self__", None), torch.Tensor
        )
        if of_tensor:
            args = (callee.__self__, *args)
        changed = watch(operation.name, "input", leaves.inputs(args, kwargs))
        if changed is not None:
            args, kwargs = changed["args"], changed["kwargs"]
        if of_tensor:
            callee, args = getattr(args[0], operation.attribute), args[1:]
        output = callee(*args, **kwargs)
        changed = watch(operation.name, "output", output)
        return output if changed is None else changed

    return operate


def _exchanged(
    function: Any, inner: FunctionType, other: FunctionType, depth: int = _MAX_WRAPPERS
) -> Any:
    """Return `function` with `inner`, which it calls or is, replaced by `other`.

    None if `inner` is not found in it. Decorators, and the wrappers of tensor parallelism, hold
    what they call in their closure.
    """
    if function is inner:
        return other
    if isinstance(function, MethodType):
        changed = _exchanged(function.__func__, inner, other, depth)
        return None if changed is None else MethodType(changed, function.__self__)
    if not isinstance(function, FunctionType) or not function.__closure__ or not depth:
        return None
    cells: list[CellType] = []
    for cell in function.__closure__:
        changed = _exchanged(_content(cell), inner, other, depth - 1)
        cells.append(cell if changed is None else CellType(changed))
    if all(new is old for new, old in zip(cells, function.__closure__, strict=True)):
        return None
    copy = FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells),
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__dict__.update(function.__dict__)
    return copy


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


# ---------------------------------------------------------------- rewriting


@cache
def _rewritten(function: FunctionType) -> Rewritten | str:
    """Return a function rewritten, or why it can't be."""
    try:
        return Rewritten(function)
    except Unoffered as error:
        return str(error)


def _parse(function: FunctionType) -> tuple[ast.Module, list[str], int]:
    """Return a function's syntax tree, its source lines, and the number of the first of them."""
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError):
        raise Unoffered("its source is not there") from None
    source = textwrap.dedent("".join(lines))
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise Unoffered(f"its source can't be parsed: {error}") from None
    if not tree.body or not isinstance(tree.body[0], ast.FunctionDef):
        raise Unoffered("it is no plain function")
    return tree, source.splitlines(keepends=True), first


def _check(definition: ast.FunctionDef) -> None:
    """Refuse what would mean something else in another place."""
    for node in ast.walk(definition):
        if isinstance(node, ast.Yield | ast.YieldFrom | ast.Await):
            raise Unoffered("it is a generator")
        if isinstance(node, ast.Nonlocal | ast.Global):
            raise Unoffered("it assigns to variables outside of itself")
        name = getattr(node, "attr", getattr(node, "id", ""))
        if name.startswith("__") and not name.endswith("__"):
            raise Unoffered(f"it uses a private name of its class, {name}")
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and called.id in _FRAME_DEPENDENT:
            raise Unoffered(f"it calls {called.id}()")


class _Operations(ast.NodeTransformer):
    """Lets each operation go through the callback, and names it."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._counts: Counter[str] = Counter()

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        name, attribute = _called(node.func), ""
        if name is None or _is_in_place(node):
            return node
        if isinstance(node.func, ast.Attribute):
            attribute = node.func.attr
        line = node.func.end_lineno or node.lineno
        return self._through(node, name, line, [node.func, *node.args], node.keywords, attribute)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        self.generic_visit(node)
        if type(node.op) not in _BINARY:
            return node
        name, function = _BINARY[type(node.op)]
        args: list[ast.expr] = [ast.Constant(None), node.left, node.right]
        return self._through(node, name, node.lineno, args, [], "", function)

    def _through(
        self,
        node: ast.expr,
        name: str,
        line: int,
        args: list[ast.expr],
        keywords: list[ast.keyword],
        attribute: str,
        function: Callable[[Any, Any], Any] | None = None,
    ) -> ast.expr:
        number = ast.Constant(len(self.operations))
        unique = f"{name}_{self._counts[name]}"
        self._counts[name] += 1
        self.operations.append(Operation(unique, line - 1, attribute, function))
        call = ast.Call(ast.Name(_OPERATE, ast.Load()), [number, *args], keywords)
        return ast.copy_location(call, node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def _leave(self, node: ast.AST) -> ast.AST:
        """Functions inside of the forward may run anywhere."""
        return node

    visit_Lambda = visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _leave


def _called(callee: ast.expr) -> str | None:
    """Return what a call is named after, or None if it is no operation."""
    if isinstance(callee, ast.Name):
        return None if hasattr(builtins, callee.id) else callee.id
    if isinstance(callee, ast.Attribute):
        parts = [callee.attr]
        owner = callee.value
        while isinstance(owner, ast.Attribute | ast.Subscript):
            if isinstance(owner, ast.Attribute):
                parts.insert(0, owner.attr)
            owner = owner.value
        if isinstance(owner, ast.Name) and owner.id == "self":
            return "_".join(["self", *parts])
        return callee.attr
    if isinstance(callee, ast.Subscript):
        return _called(callee.value)
    return "call"


def _is_in_place(node: ast.Call) -> bool:
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    named = {keyword.arg for keyword in node.keywords}
    return (name.endswith("_") and not name.endswith("__")) or bool(named & {"out", "inplace"})


def _compiled(
    definition: ast.FunctionDef, function: FunctionType, first: int
) -> Callable[..., FunctionType]:
    """Compile a definition; return what makes a function of it that calls a given callback."""
    definition.decorator_list = []
    definition.returns = None
    _strip(definition.args)
    free: Mapping[str, CellType] = dict(
        zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    )
    outer = [_OPERATE, *free]
    factory = ast.parse(f"def factory({', '.join(outer)}): pass").body[0]
    assert isinstance(factory, ast.FunctionDef)
    give = ast.Return(ast.Name(definition.name, ast.Load()))
    factory.body = [definition, give]
    tree = ast.fix_missing_locations(ast.Module([factory], []))
    ast.increment_lineno(tree, first - 1)
    namespace: dict[str, Any] = {}
    code = compile(tree, function.__code__.co_filename, "exec", dont_inherit=True)
    exec(code, function.__globals__, namespace)
    try:
        contents = {name: cell.cell_contents for name, cell in free.items()}
    except ValueError:
        raise Unoffered("a variable around it has no value") from None
    made: Callable[..., FunctionType] = namespace["factory"]
    return lambda operate: made(operate, **contents)


def _strip(arguments: ast.arguments) -> None:
    """Drop annotations and defaults: the original's values are used, not computed anew."""
    arguments.defaults = []
    arguments.kw_defaults = [None] * len(arguments.kwonlyargs)
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    for argument in (*every, arguments.vararg, arguments.kwarg):
        if argument is not None:
            argument.annotation = None
