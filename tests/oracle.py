"""The slow, obvious path: one request, one forward of plain transformers, plain PyTorch hooks.

Nothing of the ragged batch, the interleaver, the programs or the sharding is used here. What is
shared with the engine is proven by itself: the operations of the catalogue (`ops`), the addresses
of tensors inside a module's arguments (`leaves`), and how the operations inside of a forward are
watched (`operations`, see tests/integration/engine/test_operations.py).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DynamicCache,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ndif_actor.engine import leaves, operations, ops
from ndif_client.wire.catalogue import CATALOGUE
from ndif_client.wire.graph import (
    Apply,
    AttentionPort,
    Backward,
    CallModule,
    Constant,
    Graph,
    HookPoint,
    Node,
    Parameter,
    ReadGradient,
    ReadHook,
    Save,
    WriteGradient,
    WriteHook,
    references,
)
from ndif_client.wire.tensors import import_array

CPU = torch.device("cpu")

#: Prompts to tell axes apart with.
_LENGTH = 53
_MEASURE = [[[3] * _LENGTH, [4] * _LENGTH]]

#: Token ids per invoke and prompt.
Invokes = Sequence[Sequence[Sequence[int]]]

#: Saved values by the number of their `Save` node.
Saved = dict[int, Any]


class NeverRan(Exception):
    """Nodes wait for what did not come in the forward, or in a backward."""


class Oracle:
    """A model as transformers loads it, and the graphs of single requests run on it."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        (stored,) = AutoConfig.from_pretrained(folder).architectures
        masked = stored.endswith("ForMaskedLM")
        auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        model = auto.from_pretrained(folder, dtype=dtype)
        if dtype == torch.float64 and model.get_experts_implementation()[""] is not None:
            model.set_experts_implementation("eager")  # the default has no kernel in this dtype
        # An attention with sinks does more than the one written out.
        has_sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
        if model._supports_attention_backend and not has_sinks:
            model.set_attn_implementation("written_out")
        elif not model._supports_sdpa:
            model.set_attn_implementation("eager")
        self.model = model.eval()
        self._axes: dict[HookPoint, _Axes] = {}

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits `[1, sequence, vocabulary]` of one prompt, without any hook."""
        with torch.no_grad():
            logits: torch.Tensor = self.model(torch.tensor([ids]), use_cache=False).logits
        return logits

    def run(self, invokes: Invokes, graph: Graph, buffers: Sequence[bytes] = ()) -> Saved:
        """Run one forward over the prompts of one request, left-padded if they differ in length.

        Returns:
            What the graph saves.

        Raises:
            NeverRan: some of it waited in vain.
        """
        run = _Run(self.model, invokes, graph, buffers, self._axes_of(graph))
        with torch.set_grad_enabled(graph.differentiates):
            run.advance(None, None)
            run.forward()
            run.differentiate()
        if run.pending:
            raise NeverRan(run.pending)
        return run.saved

    def generate(
        self,
        invokes: Invokes,
        graph: Graph,
        num_steps: int,
        buffers: Sequence[bytes] = (),
    ) -> tuple[dict[tuple[int, int], Any], list[list[int]]]:
        """Generate greedily, step after step, with transformers' own cache.

        Returns:
            What the graph saves, by the number of its `Save` node and the step, and the tokens
            made after each prompt.
        """
        saved: dict[tuple[int, int], Any] = {}
        made: list[list[int]] = [[] for invoke in invokes for _ in invoke]
        values: dict[int, Any] = {}
        cache = DynamicCache()
        for step in range(num_steps):
            run = _Run(self.model, invokes, graph, buffers, self._axes_of(graph), step)
            run.values |= {n: value for n, value in values.items() if n not in run.pending}
            if step:
                run.continue_after([tokens[-1] for tokens in made])
            with torch.no_grad():
                run.advance(None, None)
                logits = run.forward(cache)
            assert not run.pending, f"never ran at step {step}: {run.pending}"
            saved |= {(number, step): value for number, value in run.saved.items()}
            values = run.values
            for tokens, row in zip(made, logits[:, -1], strict=True):
                tokens.append(int(row.argmax()))
        return saved, made

    def _axes_of(self, graph: Graph) -> dict[HookPoint, _Axes]:
        """Return which axes are the prompts' and the tokens' at what a graph touches.

        Found in a forward of sizes that no other axis of the small models has.
        """
        touched = {node.hook for node in graph.nodes if isinstance(node, ReadHook | WriteHook)}
        if unknown := sorted(touched - self._axes.keys()):
            shapes = _Shapes(self.model, _MEASURE, Graph([ReadHook(hook) for hook in unknown]))
            with torch.no_grad():
                shapes.forward()
            for number, hook in enumerate(unknown):
                shape = shapes.values[number]
                flat = _LENGTH not in shape
                axis = shape.index(len(_MEASURE[0]) * _LENGTH if flat else _LENGTH)
                self._axes[hook] = _Axes(axis, flat)
        return self._axes


class _Axes(NamedTuple):
    """Where a tensor has its tokens, and whether the prompts lie along the same axis.

    Otherwise the prompts are its first axis.
    """

    tokens: int
    flat: bool


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention written out, of which the running request can see and replace each step."""
    run = _running[-1] if _running else None

    def step(port: AttentionPort, tensor: torch.Tensor) -> torch.Tensor:
        if run is None:
            return tensor
        seen: torch.Tensor = run.advance(HookPoint(run.paths[module], port), tensor)
        return seen

    query, key, value = step("query", query), step("key", key), step("value", value)
    groups = query.shape[1] // key.shape[1]
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scale
    if (cap := options.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        low = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(mask < 0, low)
    pattern = step("pattern", step("scores", scores).softmax(-1))
    result = step("result", pattern @ value.repeat_interleave(groups, 1))
    return result.transpose(1, 2).contiguous(), None


#: The forward that runs now, if one does.
_running: list[_Run] = []

AttentionInterface.register("written_out", _attention)
AttentionMaskInterface.register("written_out", eager_mask)


def _followed(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Have autograd follow what the model makes of its embeddings, as it does by default."""
    return output if output.requires_grad else output.detach().requires_grad_()


class _Run:
    """One forward, and the nodes that did not run yet.

    At each firing of a hook, whatever can run does: a node whose operands are there, and whose own
    hook point, if it has one, is the one that fires.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        invokes: Invokes,
        graph: Graph,
        buffers: Sequence[bytes] = (),
        axes: Mapping[HookPoint, _Axes] | None = None,
        step: int = 0,
    ) -> None:
        self.model = model
        self.buffers = buffers
        self.axes = axes or {}
        self.step = step
        self.pending: dict[int, Node] = {
            number: node
            for number, node in enumerate(graph.nodes)
            if step in graph.steps_of(number)
        }
        self.watched = {
            node.of.node for node in graph.nodes if isinstance(node, ReadGradient | WriteGradient)
        }
        self.flows: dict[int, tuple[torch.Tensor, HookPoint, int]] = {}
        self.differentiates = graph.differentiates
        self.values: dict[int, Any] = {}
        self.saved: Saved = {}
        self.lengths = [[len(prompt) for prompt in invoke] for invoke in invokes]
        self.prompts = [prompt for invoke in invokes for prompt in invoke]
        self.longest = max(map(len, self.prompts))
        self.before = [0] * len(self.prompts)
        self.padding = [self.longest - len(prompt) for prompt in self.prompts]
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.calling = False
        self.paths = {module: path for path, module in model.named_modules()}
        # RoBERTa's positions come after that of padding.
        roberta = model.config.model_type == "roberta"  # type: ignore[union-attr]
        self.first_position = model.config.pad_token_id + 1 if roberta else 0  # type: ignore[union-attr, operator]

    def continue_after(self, tokens: Sequence[int]) -> None:
        """Take one token of each sequence instead of its prompt, which is in the cache."""
        self.before = [len(prompt) + self.step - 1 for prompt in self.prompts]
        self.prompts = [[token] for token in tokens]
        self.lengths = [[1] * len(invoke) for invoke in self.lengths]
        self.longest = 1

    def forward(self, cache: DynamicCache | None = None) -> torch.Tensor:
        inside = {
            node.hook.path
            for node in self.pending.values()
            if isinstance(node, ReadHook | WriteHook) and node.hook.operation
        }
        with ExitStack() as stack:
            for path, module in self.model.named_modules():
                before = module.register_forward_pre_hook(self._pre_hook(path), with_kwargs=True)
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(self._hook(path)).remove)
                if path in inside:
                    stack.enter_context(operations.watching(module, self._inside(path)))
            if self.differentiates:
                embedding = self.model.get_input_embeddings()  # type: ignore[operator]
                stack.callback(embedding.register_forward_hook(_followed).remove)
            _running.append(self)
            stack.callback(_running.pop)
            cached = {} if cache is None else {"past_key_values": cache}
            output = self.model(**self._inputs(), use_cache=cache is not None, **cached)
        logits: torch.Tensor = output.logits
        return logits

    def advance(self, point: HookPoint | None, structure: Any) -> Any:
        """Run what can run while `structure` is at the hook point, and return what it becomes."""
        with torch.set_grad_enabled(self.differentiates):
            return self._advance(point, structure)

    def _advance(self, point: HookPoint | None, structure: Any) -> Any:
        for number, node in list(self.pending.items()):
            if any(used not in self.values for used in references(node)):
                continue
            if isinstance(node, Backward | ReadGradient | WriteGradient):
                continue
            if isinstance(node, ReadHook | WriteHook):
                if point is None or point != msgspec.structs.replace(node.hook, leaf=""):
                    continue
                here = leaves.get(structure, node.hook.leaf)
                if isinstance(node, ReadHook):
                    if number in self.watched and node.hook.port == "input" and here.requires_grad:
                        # What enters a module is used by others, too: its gradient is of all.
                        self.flows[number] = (here, node.hook, node.invoke)
                    self.values[number] = self._read(here, node.hook, node.invoke)
                    if number in self.watched and number not in self.flows:
                        value = self._watch(number)
                        changed = self._written(here, node.hook, node.invoke, value)
                        structure = leaves.replace(structure, node.hook.leaf, changed)
                else:
                    value = ops.resolve(node.value, self.values.__getitem__)
                    changed = self._written(here, node.hook, node.invoke, value)
                    structure = leaves.replace(structure, node.hook.leaf, changed)
            else:
                self._compute(number, node)
                if number in self.watched:
                    self._watch(number)
            del self.pending[number]
        return structure

    def differentiate(self) -> None:
        """Run the backwards, one after another, each with hooks on the values it is for."""
        for number, node in list(self.pending.items()):
            if not isinstance(node, Backward):
                continue
            del self.pending[number]
            handles = [
                self._hold(number, value)
                for value in sorted(self.watched, reverse=True)
                if self.values[value].requires_grad
            ]
            loss = self.values[node.loss.node]
            first = None if node.gradient is None else self.values[node.gradient.node]
            loss.backward(first, retain_graph=True)
            for handle in handles:
                handle.remove()

    def _hold(self, backward: int, value: int) -> Any:
        hook = self._gradient_hook(backward, value)
        if value not in self.flows:
            return self.values[value].register_hook(hook)
        flow, place, invoke = self.flows[value]

        def of_rows(gradient: torch.Tensor) -> torch.Tensor:
            mine = self._read(gradient, place, invoke)
            changed = hook(mine)
            return gradient if changed is mine else self._written(gradient, place, invoke, changed)

        return flow.register_hook(of_rows)

    def _gradient_hook(self, backward: int, value: int) -> Any:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            for number, node in list(self.pending.items()):
                if not isinstance(node, ReadGradient | WriteGradient):
                    continue
                if (node.backward, node.of.node) != (backward, value):
                    continue
                if isinstance(node, ReadGradient):
                    self.values[number] = gradient
                else:
                    self.advance(None, None)
                    changed = ops.resolve(node.value, self.values.__getitem__)
                    gradient = torch.as_tensor(changed, dtype=gradient.dtype).expand_as(gradient)
                del self.pending[number]
            self.advance(None, None)
            return gradient

        return hook

    def _watch(self, number: int) -> torch.Tensor:
        value = self.values[number]
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        self.values[number] = value.clone()
        return self.values[number]

    def _inputs(self) -> dict[str, torch.Tensor]:
        ids, mask, positions = [], [], []
        for prompt, before, pad in zip(self.prompts, self.before, self.padding, strict=True):
            padding = [0] * (self.longest - len(prompt))
            ids.append([*padding, *prompt])
            mask.append([*[0] * pad, *[1] * (before + len(prompt))])
            count = range(self.first_position + before, self.first_position + before + len(prompt))
            positions.append([*padding, *count])
        inputs = {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "position_ids": torch.tensor(positions),
        }
        known = inspect.signature(self.model.forward).parameters
        return {name: value for name, value in inputs.items() if name in known}

    def _pre_hook(self, path: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            changed = self._fire(path, "input", leaves.inputs(args, kwargs))
            return changed["args"], changed["kwargs"]

        return hook

    def _hook(self, path: str) -> Any:
        return lambda module, args, output: self._fire(path, "output", output)

    def _inside(self, path: str) -> Any:
        return lambda name, port, structure: self._fire(path, port, structure, name)

    def _fire(self, path: str, port: Any, structure: Any, operation: str = "") -> Any:
        if self.calling:
            return structure
        point = HookPoint(path, port, "", self.calls[path, port, operation], operation)
        self.calls[path, port, operation] += 1
        return self.advance(point, structure)

    def _compute(self, number: int, node: Node) -> None:
        match node:
            case Apply(op=name, args=args, kwargs=kwargs):
                self.values[number] = ops.apply(CATALOGUE[name], *self._resolved(args, kwargs), CPU)
            case CallModule(path=path, args=args, kwargs=kwargs):
                positional, named = self._resolved(args, kwargs)
                self.calling = True
                self.values[number] = self.model.get_submodule(path)(*positional, **named)
                self.calling = False
            case Parameter(path=path):
                owner, _, name = path.rpartition(".")
                self.values[number] = getattr(self.model.get_submodule(owner), name)
            case Constant(tensor=spec):
                self.values[number] = import_array(spec, self.buffers[spec.buffer], "torch")
            case Save(value=ref):
                value = self.values[ref.node]
                own = value if isinstance(value, tuple) else (value,)
                detached = tuple(item.detach() for item in own)
                self.saved[number] = detached if isinstance(value, tuple) else detached[0]

    def _resolved(self, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
        values = self.values.__getitem__
        return (
            [ops.resolve(arg, values) for arg in args],
            {name: ops.resolve(arg, values) for name, arg in kwargs.items()},
        )

    # ------------------------------------------------------------ an invoke's rows

    def _read(self, tensor: torch.Tensor, hook: HookPoint, invoke: int) -> Any:
        """Return an invoke's rows, its shorter prompts padded with zeros on the left."""
        if hook.port in ("scores", "pattern"):
            return self._read_square(tensor, invoke)
        split, axis, tokens = self._split(tensor, hook)
        lengths = self.lengths[invoke]
        longest = max(lengths)
        shape = list(split.shape)
        shape[axis], shape[tokens] = len(lengths), longest
        rows = split.new_zeros(shape)
        for i, length in enumerate(lengths):
            real = split.select(axis, self._first(invoke) + i).narrow(
                tokens - 1, self.longest - length, length
            )
            rows.select(axis, i).narrow(tokens - 1, longest - length, length).copy_(real)
        return rows if split.dim() == tensor.dim() else rows.flatten(axis, tokens)

    def _written(
        self, tensor: torch.Tensor, hook: HookPoint, invoke: int, value: Any
    ) -> torch.Tensor:
        """Return a copy of `tensor` with an invoke's rows, its padding excepted, replaced."""
        if hook.port in ("scores", "pattern"):
            return self._written_square(tensor, invoke, value)
        split, axis, tokens = self._split(tensor.clone(), hook)
        mine = self._read(tensor, hook, invoke)
        value = torch.as_tensor(value).expand(mine.shape)
        lengths = self.lengths[invoke]
        longest = max(lengths)
        if split.dim() != tensor.dim():
            value = value.unflatten(axis, (len(lengths), longest))
        for i, length in enumerate(lengths):
            split.select(axis, self._first(invoke) + i).narrow(
                tokens - 1, self.longest - length, length
            ).copy_(value.select(axis, i).narrow(tokens - 1, longest - length, length))
        return split.reshape(tensor.shape)

    def _read_square(self, tensor: torch.Tensor, invoke: int) -> torch.Tensor:
        lengths = self.lengths[invoke]
        longest = max(lengths)
        rows = tensor.new_zeros(len(lengths), tensor.shape[1], longest, longest)
        for i, n in enumerate(lengths):
            rows[i, :, longest - n :, longest - n :] = tensor[self._first(invoke) + i, :, -n:, -n:]
        return rows

    def _written_square(self, tensor: torch.Tensor, invoke: int, value: Any) -> torch.Tensor:
        changed = tensor.clone()
        whole = torch.as_tensor(value).expand(self._read_square(tensor, invoke).shape)
        for i, n in enumerate(self.lengths[invoke]):
            changed[self._first(invoke) + i, :, -n:, -n:] = whole[i, :, -n:, -n:]
        return changed

    def _split(self, tensor: torch.Tensor, hook: HookPoint) -> tuple[torch.Tensor, int, int]:
        """Return a tensor with axes for prompts and tokens, and which ones those are."""
        axis, flat = self.axes[hook]
        if not flat:
            return tensor, 0, axis
        return tensor.unflatten(axis, (len(self.prompts), self.longest)), axis, axis + 1

    def _first(self, invoke: int) -> int:
        return sum(map(len, self.lengths[:invoke]))


class _Shapes(_Run):
    """Reads shapes instead of values."""

    def _read(self, tensor: torch.Tensor, hook: HookPoint, invoke: int) -> Any:
        return tuple(tensor.shape)
