"""Shapes, dtypes and price of every value of a program, from torch itself on meta tensors.

Nothing is computed: each node runs on tensors without data, so what torch would refuse is refused
here, at admission, with the user's line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from ndif_actor.engine import ops
from ndif_actor.engine.checks import graph_fault
from ndif_actor.engine.held import from_spec
from ndif_actor.engine.program import Program
from ndif_client.wire.catalogue import ALIASES, CATALOGUE
from ndif_client.wire.graph import (
    Apply,
    Backward,
    CallModule,
    Choose,
    Constant,
    EndGeneration,
    Held,
    Keep,
    Log,
    Node,
    Parameter,
    ReadGradient,
    ReadHook,
    Ref,
    Save,
    Steps,
    WriteGradient,
    WriteHook,
)
from ndif_client.wire.messages import HeldSpec, ValueInfo

_META = torch.device("meta")


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for, known before it runs.

    Attributes:
        tokens: rows it adds to a forward.
        saved_bytes: bytes of its result, over all steps.
        saved_tensors: how many tensors that is.
        value_bytes: bytes of all values its nodes make, an upper bound of what it holds at once,
            and of what is kept for its backwards.
        flops: floating-point operations of its own nodes, without the model's.
        kept: what it keeps, by name.
    """

    tokens: int
    saved_bytes: int
    saved_tensors: int
    value_bytes: int
    flops: int
    kept: dict[str, HeldSpec] = {}


class Shapes(msgspec.Struct, frozen=True):
    """The meta value of each node (None for writes and saves), by node number.

    Attributes:
        prefill: at step 0, where a prompt has all its tokens.
        decode: at any later step, where each sequence has one.
    """

    prefill: dict[int, Any]
    decode: dict[int, Any]

    def at(self, step: int) -> dict[int, Any]:
        """Return what is known at a step, values of earlier steps included."""
        return self.prefill if step == 0 else {**self.prefill, **self.decode}


def infer(
    program: Program,
    model: PreTrainedModel,
    lengths: Sequence[Sequence[int]],
    num_steps: int = 1,
    held: Mapping[str, HeldSpec] | None = None,
    decoder_lengths: Sequence[Sequence[int]] = (),
    *,
    at_last: bool = True,
) -> Shapes:
    """Find the shape and dtype of every value.

    Args:
        program: the compiled graph.
        model: the model without weights.
        lengths: tokens of each prompt, per invoke.
        num_steps: steps it may take; 1 for a trace.
        held: what the held values are that it uses.
        decoder_lengths: what a decoder beside an encoder reads of each prompt, likewise.
        at_last: of what repeats after the prefill, the last; later steps have ever more keys to
            attend to. Otherwise the first.

    Raises:
        RequestError: torch refuses a node, or a write does not fit its hook point.
    """
    graph = program.graph
    shapes = Shapes({}, {})
    extent = partial(_Extent, lengths, decoder_lengths)
    for step in _representatives(program, num_steps):
        known = shapes.at(step)
        new = shapes.prefill if step == 0 else shapes.decode
        with torch.no_grad(), _OneDtype():
            for number in program.nodes_at(step):
                if number in new:
                    continue
                node = graph.nodes[number]
                try:
                    if isinstance(node, Held):
                        value: Any = _held(node, held or {}, known)
                    else:
                        steps = graph.steps_of(number)
                        last = num_steps - 1 if at_last and not steps.single else steps.start
                        past = step and max(1, last)
                        value = _infer(node, program, model, extent(past), known)
                    if number in program.conditions.deciding:
                        _check_decision(value)
                except ops.REFUSALS as error:
                    message = f"{_describe(node, known)}: {_first_line(error)}"
                    raise graph_fault(graph, number, message) from None
                known[number] = new[number] = value
    return shapes


def _held(node: Held, held: Mapping[str, HeldSpec], known: Mapping[int, Any]) -> Any:
    if node.otherwise is None:
        return from_spec(held[node.name])
    otherwise = known[node.otherwise.node]
    return _same(from_spec(held[node.name]), otherwise) if node.name in held else otherwise


def price(
    program: Program, shapes: Shapes, lengths: Sequence[Sequence[int]], num_steps: int = 1
) -> Price:
    """Add up what a program makes and saves."""
    saved = tensors = value_bytes = flops = 0
    decode = shapes.at(1)
    for number, node in enumerate(program.graph.nodes):
        later = _count(program.graph.steps_of(number), num_steps)
        own = [
            (known, known[number], times)
            for known, times in ((shapes.prefill, 1), (decode, later))
            if times and number in known
        ]
        if isinstance(node, Held):
            continue  # it is there already
        if isinstance(node, Keep):
            value_bytes += _bytes(own[-1][0][node.value.node])
            continue
        if isinstance(node, Save):
            saved += sum(_bytes(known[node.value.node]) * times for known, _, times in own)
            tensors += sum(_tensors_in(known[node.value.node]) * times for known, _, times in own)
            continue
        value_bytes += max((_bytes(value) for _, value, _ in own), default=0)
        flops += sum(_flops(node, value, known) * times for known, value, times in own)
    return Price(
        tokens=sum(map(sum, lengths)),
        saved_bytes=saved,
        saved_tensors=tensors,
        value_bytes=value_bytes,
        flops=flops,
    )


def _representatives(program: Program, num_steps: int) -> list[int]:
    """Return steps after which every node has been seen, at the prefill and at a later step."""
    second = {steps.start + steps.stride for steps in program.blocks() if 0 in steps}
    steps = {*program.first_steps(), *second}
    return sorted(step for step in steps if step < num_steps)


def _count(steps: Steps, num_steps: int) -> int:
    """Return how many of the steps come after the prefill."""
    stop = num_steps if steps.stop is None else min(steps.stop, num_steps)
    first = steps.start or steps.stride
    return len(range(first, stop, steps.stride))


def _infer(
    node: Node,
    program: Program,
    model: PreTrainedModel,
    extent: _Extent,
    values: dict[int, Any],
) -> Any:
    match node:
        case ReadHook():
            return _own(program, node, extent)
        case WriteHook():
            _check_write(ops.resolve(node.value, values.__getitem__), _own(program, node, extent))
            return None
        case Constant(tensor=spec):
            return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=_META)
        case Parameter(path=path):
            return parameter(model, path)
        case CallModule():
            module = submodule(model, node.path)
            args, kwargs = arguments(node, values.__getitem__)
            _check_ids(module, (*args, *kwargs.values()))
            return _tensors(module(*args, **kwargs))
        case Apply(op=name):
            op = CATALOGUE.get(name)
            if op is None:
                raise LookupError(_unknown_op(name))
            args, kwargs = arguments(node, values.__getitem__)
            ops.bind(op, args, kwargs)
            return ops.apply(op, args, kwargs, _META)
        case Choose(then=then, otherwise=otherwise):
            return _same(values[then.node], values[otherwise.node])
        case Backward(loss=loss, gradient=gradient):
            given = None if gradient is None else values[gradient.node]
            _check_differentiable(values[loss.node], given)
            return None
        case ReadGradient(of=of):
            _check_watched(values[of.node])
            return torch.empty_like(values[of.node], device=_META)
        case WriteGradient(of=of, value=value):
            _check_watched(values[of.node])
            _check_write(ops.resolve(value, values.__getitem__), values[of.node], "gradient")
            return None
        case Save(value=value) | Keep(value=value):
            if not isinstance(values[value.node], torch.Tensor | tuple):
                what = "saved" if isinstance(node, Save) else "kept"
                raise TypeError(f"only tensors can be {what}")
            return None
        case EndGeneration():
            return None
        case Log(items=items):
            shown = [values[item.node] for item in items if isinstance(item, Ref)]
            if any(not isinstance(value, torch.Tensor | tuple) for value in shown):
                raise TypeError("only texts and tensors can be logged")
            return None


def describe(value: Any) -> ValueInfo | None:
    """Return the shape and dtype of a meta value; None if it is none."""
    if isinstance(value, tuple):
        return ValueInfo(items=[info for info in map(describe, value) if info is not None])
    if not isinstance(value, torch.Tensor):
        return None
    return ValueInfo(list(value.shape), _name(value.dtype))


def failure(node: Node, error: BaseException) -> str:
    """Return what to tell the author of a node that failed while it ran."""
    match node:
        case Apply(op=name):
            what = name
        case CallModule(path=path):
            what = path
        case ReadHook(hook=hook) | WriteHook(hook=hook):
            what = str(hook)
        case _:
            what = type(node).__name__
    return f"{what}: {_first_line(error)}"


def arguments(node: Apply | CallModule, values: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return the resolved arguments of a node."""
    args = [ops.resolve(argument, values) for argument in node.args]
    return args, {name: ops.resolve(value, values) for name, value in node.kwargs.items()}


def parameter(model: torch.nn.Module, path: str) -> torch.Tensor:
    """Return a parameter or buffer by its path.

    Raises:
        LookupError: the model has none of that name.
    """
    owner, _, name = path.rpartition(".")
    module = submodule(model, owner)
    own: dict[str, torch.Tensor | None] = {**module._parameters, **module._buffers}
    value = own.get(name)
    if value is None:
        offered = ", ".join(own) or "none"
        raise LookupError(f"{owner or 'the model'} has no parameter {name!r}; it has {offered}")
    return value


def submodule(model: torch.nn.Module, path: str) -> torch.nn.Module:
    """Return a module by its path.

    Raises:
        LookupError: the model has none there.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise LookupError(f"the model has no module {path!r}") from None


class _Extent(NamedTuple):
    """Tokens of each prompt, per invoke, also in the decoder, and the step: 0 at the prefill."""

    lengths: Sequence[Sequence[int]]
    decoder_lengths: Sequence[Sequence[int]]
    step: int


def _own(program: Program, node: ReadHook | WriteHook, extent: _Extent) -> torch.Tensor:
    site = program.sites[node.hook]
    mine = (extent.decoder_lengths if site.in_decoder else extent.lengths)[node.invoke]
    shape = site.shape_for(len(mine), 1 if extent.step else max(mine), max(mine) + extent.step)
    return torch.empty(shape, dtype=site.dtype, device=_META)


class _OneDtype(TorchDispatchMode):
    """Refuse products of unequal dtypes, as every device does; meta tensors would let them pass.

    Under tensor parallelism such an error in the midst of a module would look like a lost peer.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.overloadpacket in _PRODUCTS:
            dtypes = {a.dtype for a in args if isinstance(a, torch.Tensor)}
            if len(dtypes) > 1:
                names = " and ".join(sorted(map(_name, dtypes)))
                raise TypeError(f"{names} can't be multiplied; convert one with .to(...)")
        return func(*args, **(kwargs or {}))


_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name)
    for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_cdist_forward")
)


def _check_ids(module: torch.nn.Module, args: Sequence[Any]) -> None:
    """Let only embeddings look things up: they alone check what they are asked for."""
    if not any(isinstance(a, torch.Tensor) and not a.is_floating_point() for a in args):
        return
    looks_up = any(isinstance(m, torch.nn.Embedding) for m in module.modules())
    if not looks_up and any(True for _ in module.parameters()):
        raise TypeError("only embeddings take integers; convert the value with .to(...)")


def _check_decision(value: Any) -> None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or value.is_complex():
        raise TypeError(
            f"a condition is one number, true if it is not 0, and not {_shown(value)}; use .any() "
            "or .all()"
        )


def _same(then: Any, otherwise: Any) -> Any:
    if _shown(then) != _shown(otherwise):
        raise ValueError(
            f"the values to choose between must be alike, not {_shown(then)} and "
            f"{_shown(otherwise)}"
        )
    return then


def _check_differentiable(loss: Any, gradient: Any) -> None:
    if not isinstance(loss, torch.Tensor) or not loss.is_floating_point():
        raise TypeError(f"only a tensor of floats can be differentiated, not {_shown(loss)}")
    if gradient is None:
        if loss.numel() != 1:
            raise ValueError(
                f"{_shown(loss)} is not one number: take its sum or mean, or give the gradient to "
                "begin with, backward(gradient=...)"
            )
    elif not isinstance(gradient, torch.Tensor) or gradient.shape != loss.shape:
        raise ValueError(
            f"the gradient {_shown(gradient)} to begin with has not the shape of {_shown(loss)}"
        )


def _check_watched(value: Any) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"only a tensor of floats has a gradient, not {_shown(value)}")


def _check_write(value: Any, target: torch.Tensor, what: str = "hook point") -> None:
    if isinstance(value, bool | int | float):
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"a tensor or number is needed, not {type(value).__name__}")
    if value.is_complex():
        raise TypeError(f"a {_name(value.dtype)} value can't be written to {_name(target.dtype)}")
    shape, wanted = list(value.shape), list(target.shape)
    try:
        fits = list(torch.broadcast_shapes(value.shape, target.shape)) == wanted
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"a value of shape {shape} does not fit the {what}'s {wanted}")


def _tensors(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, tuple | list):
        return tuple(item for item in output if isinstance(item, torch.Tensor))
    raise TypeError(f"the module returns {type(output).__name__}, not tensors")


def _unknown_op(name: str) -> str:
    hint = f"; it is called {ALIASES[name]!r} here" if name in ALIASES else ""
    return f"{name!r} is not in the catalogue of operations{hint}"


def _describe(node: Node, values: Mapping[int, Any]) -> str:
    match node:
        case Apply(op=op):
            return f"{op}({_shapes(node, values)})"
        case CallModule(path=path):
            return f"{path or 'model'}({_shapes(node, values)})"
        case WriteHook(hook=hook):
            return f"write of {hook}"
        case Parameter(path=path):
            return path
        case Backward():
            return "backward"
        case Choose():
            return "choose"
        case ReadGradient() | WriteGradient():
            return "gradient"
        case _:
            return type(node).__name__


def _shapes(node: Apply | CallModule, values: Mapping[int, Any]) -> str:
    args, kwargs = arguments(node, values.__getitem__)
    shown = [_shown(value) for value in args]
    return ", ".join([*shown, *(f"{name}={_shown(value)}" for name, value in kwargs.items())])


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{_name(value.dtype)}{list(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return repr(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    if "item() cannot be called on meta tensors" in text:
        return "a number is needed here that is known before the trace runs, not a value of it"
    return text.splitlines()[0].removeprefix('"').removesuffix('"')


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, tuple) else 0


def _tensors_in(value: Any) -> int:
    return sum(map(_tensors_in, value)) if isinstance(value, tuple) else 1


def _flops(node: Node, value: Any, values: Mapping[int, Any]) -> int:
    """A coarse count: 2mnk for contractions, one operation per element otherwise."""
    if not isinstance(node, Apply) or CATALOGUE[node.op].cost == "free":
        return 0
    args, _ = arguments(node, values.__getitem__)
    taken = [a for a in args if isinstance(a, torch.Tensor)]
    made = value if isinstance(value, tuple) else (value,)
    if node.op == "low_rank":
        _, x, a, b = taken
        return 2 * x.shape[:-1].numel() * (a.numel() + b.numel())
    if CATALOGUE[node.op].cost == "matmul" and taken:
        return 2 * made[0].numel() * taken[0].shape[-1 if taken[0].dim() else 0 :].numel()
    return max((tensor.numel() for tensor in (*taken, *made)), default=0)
