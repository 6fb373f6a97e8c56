"""The intervention graph: nodes as data, in the order the user wrote them.

A node's number is its position in `Graph.nodes`; it may refer only to earlier numbers. Values are
never changed: an in-place write of the user's (`h[:, -1] = 0`) is recorded as the value after the
write (`setitem`) followed by a `WriteHook` of it, so a saved value is a snapshot of its moment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from ndif_client.wire.tensors import DtypeName, TensorSpec

#: Bounds enforced while decoding, before anything is built from a message.
MAX_NODES = 20_000
MAX_STEP_BLOCKS = 512
MAX_CONDITIONS = 4096
MAX_CONDITION_DEPTH = 256
MAX_ARGUMENTS = 4096
MAX_TEXT = 4096
MAX_PATH = 512
MAX_INVOKES = 1024
MAX_PROMPTS = 1024
MAX_TOKENS = 1 << 20
MAX_HELD_NAME = 256
MAX_LOGGED = 64

Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT)]
Path = Annotated[str, msgspec.Meta(max_length=MAX_PATH)]
Index = Annotated[int, msgspec.Meta(ge=0)]
HeldName = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_HELD_NAME)]

#: What passes inside of an attention, in this order; each has its heads along the second axis.
#: Queries and keys are those after rotary embedding, the result is before the output projection.
AttentionPort = Literal["query", "key", "value", "scores", "pattern", "result"]

Port = Literal["input", "output"] | AttentionPort


class Ref(msgspec.Struct, frozen=True, tag="ref"):
    """The value of an earlier node."""

    node: Index


class Slice(msgspec.Struct, frozen=True, tag="slice"):
    """`start:stop:step` inside an index."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None


class Dots(msgspec.Struct, frozen=True, tag="dots"):
    """`...` inside an index."""


class Dtype(msgspec.Struct, frozen=True, tag="dtype"):
    """A dtype given as an argument."""

    name: DtypeName


class Items(msgspec.Struct, frozen=True, tag="items"):
    """A list or tuple of arguments: a compound index, a shape, tensors to concatenate."""

    values: Annotated[list[Argument], msgspec.Meta(max_length=MAX_ARGUMENTS)]


Argument = Ref | Slice | Dots | Dtype | Items | None | bool | int | float | Text


class HookPoint(msgspec.Struct, frozen=True, order=True):
    """One place a graph can touch.

    Attributes:
        path: module path in the model tree, "" for the model itself.
        port: whether the module's input or its output is meant, or what passes inside of it, if it
            is an attention.
        leaf: which tensor of it: "" for a single tensor, "0" or "1.0" for items of a tuple,
            "logits" for a field, "args.0" or "kwargs.hidden_states" for inputs.
        call: which call of the module, or of the operation, in one forward, counted from 0.
        operation: name of an operation inside the module's forward, whose input or output is
            meant; "" for the module itself.
    """

    path: Path
    port: Port
    leaf: Path = ""
    call: Index = 0
    operation: Path = ""

    def __str__(self) -> str:
        inside = f"source.{self.operation}" if self.operation else ""
        place = ".".join(filter(None, (self.path, inside, self.port)))
        place += f"[{self.leaf}]" if self.leaf else ""
        return f"{place} (call {self.call})" if self.call else place


class Source(msgspec.Struct, frozen=True):
    """Where in the user's program a node was written."""

    file: Text
    line: int
    text: Text = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}"
        return f"{place}: {self.text}" if self.text else place


class ReadHook(msgspec.Struct, frozen=True, tag="read"):
    """The value at a hook point: the rows of one invoke, as if it ran alone."""

    hook: HookPoint
    invoke: Index = 0


class WriteHook(msgspec.Struct, frozen=True, tag="write"):
    """Put a value at a hook point; the model goes on with it.

    The value is broadcast to the shape of the hook point's own and cast to its dtype.
    """

    hook: HookPoint
    value: Argument
    invoke: Index = 0


class Apply(msgspec.Struct, frozen=True, tag="apply"):
    """An operation of the catalogue."""

    op: Path
    args: Annotated[list[Argument], msgspec.Meta(max_length=MAX_ARGUMENTS)] = []
    kwargs: Annotated[dict[Path, Argument], msgspec.Meta(max_length=64)] = {}


class CallModule(msgspec.Struct, frozen=True, tag="module"):
    """A module of the model applied to values; hook points inside it do not fire."""

    path: Path
    args: Annotated[list[Argument], msgspec.Meta(max_length=64)] = []
    kwargs: Annotated[dict[Path, Argument], msgspec.Meta(max_length=64)] = {}


class Parameter(msgspec.Struct, frozen=True, tag="parameter"):
    """A parameter or buffer of the model, whole and read-only."""

    path: Path


class Constant(msgspec.Struct, frozen=True, tag="constant"):
    """A tensor the client sent along."""

    tensor: TensorSpec


class Held(msgspec.Struct, frozen=True, tag="held"):
    """A value that the server holds for this session, as it is when the request starts.

    Where nothing is held as `name`, it is `otherwise`, if that is given.
    """

    name: HeldName
    otherwise: Ref | None = None


class Keep(msgspec.Struct, frozen=True, tag="keep"):
    """Hold a value for this session under `name`, in the place of what was held as that before.

    It is held when the request has ended, with all others that the request keeps; where the
    request fails, nothing changes.
    """

    value: Ref
    name: HeldName


class Save(msgspec.Struct, frozen=True, tag="save"):
    """Send a value back; it is found by this node's number, and by `name` where one is given."""

    value: Ref
    name: Text | None = None


class Log(msgspec.Struct, frozen=True, tag="log"):
    """Tell the client a line when it is reached: texts and values, with spaces between them."""

    items: Annotated[list[Ref | Text], msgspec.Meta(max_length=MAX_LOGGED)]


class EndGeneration(msgspec.Struct, frozen=True, tag="end_generation"):
    """End a generation with the token of this step, if a condition holds."""

    condition: Ref


class Backward(msgspec.Struct, frozen=True, tag="backward"):
    """Differentiate a value, after the forward.

    The gradients that later nodes read and write by this node's number are those of this value
    alone, or of its product with `gradient`, which has its shape; without one it is a scalar.
    """

    loss: Ref
    gradient: Ref | None = None


class ReadGradient(msgspec.Struct, frozen=True, tag="read_gradient"):
    """The gradient of a value, in the course of the `Backward` with that number."""

    backward: Index
    of: Ref


class WriteGradient(msgspec.Struct, frozen=True, tag="write_gradient"):
    """Replace the gradient of a value; the gradients of what it was made from follow from that.

    The value is broadcast to the gradient's shape and cast to its dtype.
    """

    backward: Index
    of: Ref
    value: Argument


class Choose(msgspec.Struct, frozen=True, tag="choose"):
    """`then` if a condition holds, else `otherwise`; the other one need not have been made."""

    condition: Ref
    then: Ref
    otherwise: Ref


Node = (
    ReadHook
    | WriteHook
    | Apply
    | CallModule
    | Parameter
    | Constant
    | Held
    | Keep
    | Save
    | Log
    | EndGeneration
    | Backward
    | ReadGradient
    | WriteGradient
    | Choose
)


NodeT = TypeVar("NodeT", bound=msgspec.Struct)


class Steps(msgspec.Struct, frozen=True):
    """Steps of a generation: `start`, `start + stride`, ... below `stop`; None is no bound.

    Step 0 is the prefill, which reads the prompt and makes the first token; step k reads token
    k - 1 and makes token k. A trace has only step 0.
    """

    start: Index = 0
    stop: Index | None = None
    stride: Annotated[int, msgspec.Meta(ge=1)] = 1

    def __contains__(self, step: int) -> bool:
        late = self.stop is not None and step >= self.stop
        return step >= self.start and not late and (step - self.start) % self.stride == 0

    def __str__(self) -> str:
        if self.single:
            return f"step {self.start}"
        if self == Steps():
            return "all steps"
        stop = "" if self.stop is None else self.stop
        stride = f":{self.stride}" if self.stride > 1 else ""
        return f"steps {self.start}:{stop}{stride}"

    @property
    def last(self) -> int | None:
        """The last of them, or None where there is no bound."""
        if self.stop is None:
            return None
        return self.start + (self.stop - 1 - self.start) // self.stride * self.stride

    @property
    def single(self) -> bool:
        """Whether it is one step only."""
        return self.last == self.start

    def includes(self, other: Steps) -> bool:
        """Whether each of the other's steps is one of these."""
        if other.single:
            return other.start in self
        if other.start not in self or other.stride % self.stride:
            return False
        return self.last is None or (other.last is not None and other.last <= self.last)


#: The only step of a trace, and the first of a generation.
PREFILL = Steps(0, 1)


class Condition(msgspec.Struct, frozen=True):
    """When nodes run: if the value of node `value`, one number, is not zero, or if it is.

    `outer` is the condition that this one lies in: 0 for none, k for the one at position k - 1.
    """

    value: Index
    negated: bool = False
    outer: Index = 0


class Graph(msgspec.Struct, frozen=True):
    """The nodes of one request in program order, when each runs, and where each was written.

    `at[i]` is the position in `sources` of the line that made node i, and `during[i]` the position
    in `steps` of the generation steps it runs at; where `during` is empty, all nodes run at the
    prefill. A node may use the values of its own step, and values of earlier single steps.
    `under[i]` is the condition that node i runs under, numbered like `Condition.outer`; where
    `under` is empty, none does. `seed` is that of the graph's random operations.
    """

    nodes: Annotated[list[Node], msgspec.Meta(max_length=MAX_NODES)] = []
    sources: Annotated[list[Source], msgspec.Meta(max_length=MAX_NODES)] = []
    at: Annotated[list[Index], msgspec.Meta(max_length=MAX_NODES)] = []
    steps: Annotated[list[Steps], msgspec.Meta(max_length=MAX_STEP_BLOCKS)] = []
    during: Annotated[list[Index], msgspec.Meta(max_length=MAX_NODES)] = []
    conditions: Annotated[list[Condition], msgspec.Meta(max_length=MAX_CONDITIONS)] = []
    under: Annotated[list[Index], msgspec.Meta(max_length=MAX_NODES)] = []
    seed: Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)] = 0

    def steps_of(self, node: int) -> Steps:
        """Return the generation steps at which `node` runs."""
        return self.steps[self.during[node]] if self.during else PREFILL

    @property
    def differentiates(self) -> bool:
        """Whether any gradient is asked for."""
        return any(isinstance(node, Backward) for node in self.nodes)

    def source_of(self, node: int) -> Source | None:
        """Return the user's line that made `node`, if the client recorded it."""
        if node >= len(self.at) or self.at[node] >= len(self.sources):
            return None
        return self.sources[self.at[node]]


class Message(msgspec.Struct, frozen=True):
    """One turn of a conversation."""

    role: Path
    content: Annotated[str, msgspec.Meta(max_length=4 << 20)]


class Chat(msgspec.Struct, frozen=True):
    """A conversation, which the model's own chat template turns into a prompt for the next turn."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1, max_length=MAX_PROMPTS)]


_Text = Annotated[str, msgspec.Meta(max_length=4 << 20)]
_TokenIds = Annotated[list[Index], msgspec.Meta(max_length=MAX_TOKENS)]


class Invoke(msgspec.Struct, frozen=True):
    """The prompts of one invoke: each a text, a list of token ids, or a conversation.

    Of a model with an encoder and a decoder, `decoder` is what the latter reads beside each prompt;
    if it is empty, the token that every decoder begins with.
    """

    prompts: Annotated[
        list[_Text | _TokenIds | Chat], msgspec.Meta(min_length=1, max_length=MAX_PROMPTS)
    ]
    decoder: Annotated[list[_Text | _TokenIds], msgspec.Meta(max_length=MAX_PROMPTS)] = []


def references(node: Node) -> list[int]:
    """Return the numbers of the nodes that `node` uses, in order, repetitions included."""
    found: list[int] = []

    def visit(argument: Argument) -> None:
        if isinstance(argument, Ref):
            found.append(argument.node)
        elif isinstance(argument, Items):
            for value in argument.values:
                visit(value)

    match node:
        case WriteHook(value=value) | Keep(value=value) | Save(value=value):
            visit(value)
        case Held(otherwise=otherwise):
            visit(otherwise)
        case Log(items=items):
            for item in items:
                visit(item)
        case EndGeneration(condition=condition):
            visit(condition)
        case Backward(loss=loss, gradient=gradient):
            visit(loss)
            visit(gradient)
        case ReadGradient(of=of):
            visit(of)
        case WriteGradient(of=of, value=value):
            visit(of)
            visit(value)
        case Choose(condition=condition, then=then, otherwise=otherwise):
            visit(condition)
            visit(then)
            visit(otherwise)
        case Apply(args=args, kwargs=kwargs) | CallModule(args=args, kwargs=kwargs):
            for value in (*args, *kwargs.values()):
                visit(value)
        case _:
            pass
    return found


def renumbered(node: NodeT, number: Callable[[int], int]) -> NodeT:
    """Return a node that refers to other numbers; `number(n)` is what node n is called now."""

    def moved(argument: Argument) -> Argument:
        if isinstance(argument, Ref):
            return Ref(number(argument.node))
        if isinstance(argument, Items):
            return Items([moved(value) for value in argument.values])
        return argument

    def change(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if isinstance(value, dict):
            return {name: moved(item) for name, item in value.items()}
        return moved(value)

    fields: dict[str, Any] = {}
    for name in node.__struct_fields__:
        value = getattr(node, name)
        if isinstance(value, Ref | Items | list | dict):
            fields[name] = change(value)
    if isinstance(node, ReadGradient | WriteGradient):
        fields["backward"] = number(node.backward)
    return msgspec.structs.replace(node, **fields)
