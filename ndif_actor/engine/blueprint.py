"""A model without weights: what admission needs to check and price a request.

Owned by the coordinator; the shards build the same one, so both agree on every hook point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, zip_longest
from pathlib import Path

import msgspec
import torch
from transformers import PreTrainedModel

from ndif_actor.engine import adapter, shapes, tree
from ndif_actor.engine.checks import graph_fault
from ndif_actor.engine.explain import explain
from ndif_actor.engine.flows import find_flows
from ndif_actor.engine.hookpoints import HookTable, discover
from ndif_actor.engine.internals import PORTS
from ndif_actor.engine.keeping import specs_kept
from ndif_actor.engine.memo import Memo
from ndif_actor.engine.probe import depth_fault, stale_operations
from ndif_actor.engine.program import Program, compile_graph
from ndif_actor.engine.retention import Retention, measure
from ndif_actor.engine.shapes import Price
from ndif_actor.errors import ModelError
from ndif_actor.messages import Group
from ndif_client.wire.graph import Backward, Constant, EndGeneration, Graph, HookPoint
from ndif_client.wire.messages import Explanation, HeldSpec, ModelTree
from ndif_client.wire.tensors import check_buffer


def _refuse_backward(graph: Graph) -> None:
    for number, node in enumerate(graph.nodes):
        if isinstance(node, Backward):
            raise graph_fault(
                graph,
                number,
                "a generation has no gradients, because its steps share a KV cache; trace its "
                "tokens as a prompt and differentiate there",
            )


def _refuse_end(graph: Graph) -> None:
    for number, node in enumerate(graph.nodes):
        if isinstance(node, EndGeneration):
            raise graph_fault(graph, number, "only a generation can be ended; a trace has one step")


def _seedless(graph: Graph) -> Graph:
    """Return the graph without what every request draws anew, and nothing here depends on."""
    return msgspec.structs.replace(graph, seed=0)


class Blueprint:
    """The modules, hook points and full shapes of a model.

    Attributes:
        model: the model on the meta device.
        table: its hook points.
        config_dtype: dtype its weights were stored in.
        max_positions: longest prompt it can take, in tokens.
        vocab_size: number of token ids it knows.
        has_encoder_and_decoder: whether a decoder reads something beside each prompt, which begins
            with the token `decoder_start` by default.
    """

    def __init__(self, model: PreTrainedModel, world_size: int) -> None:
        self.model = model
        self.world_size = world_size
        self._programs: Memo[Program] = Memo()
        self._prices: Memo[Price] = Memo()
        self.table: HookTable = discover(model)
        config = adapter.text_config(model.config)
        self.vocab_size: int = config.vocab_size
        self.has_encoder_and_decoder = adapter.has_encoder_and_decoder(model)
        self.decoder_start = adapter.decoder_start(model)
        layers = self.table.layers
        if layers and depth_fault(model, layers, self.vocab_size, torch.device("meta")):
            self.keep_rows()
        elif layers:
            self.withhold(stale_operations(model, layers, self.table.sites, self.vocab_size))
        if world_size > 1 and self.table.unpackable is not None:
            raise ModelError(
                f"{type(model).__name__} is served with --tp 1 only: {self.table.unpackable}"
            )
        self.config_dtype = adapter.config_dtype(model.config)
        self.max_positions = adapter.max_positions(model, packed=self.table.unpackable is None)

    @classmethod
    def load(cls, folder: Path, dtype: str, world_size: int) -> Blueprint:
        """Build the blueprint of the model in `folder`.

        Args:
            folder: with a config.json.
            dtype: "float32", ..., or "auto" for the one its weights were stored in.
            world_size: number of shards, checked against the model's heads and plan.

        Raises:
            ModelError: the model can't be served, or not with that many shards.
        """
        config = adapter.load_config(folder)
        name = adapter.config_dtype(config) if dtype == "auto" else dtype
        model = adapter.build_without_weights(config, adapter.torch_dtype(name))
        adapter.check_tensor_parallel(model, world_size)
        return cls(model, world_size)

    def keep_rows(self) -> None:
        """Let every row stay in the batch through all layers."""
        self._change(msgspec.structs.replace(self.table, layers=None))

    def close_attention(self) -> None:
        """Show nothing of the inside of attentions: they are transformers' own."""
        sites = {p: site for p, site in self.table.sites.items() if p.port not in PORTS}
        self._change(msgspec.structs.replace(self.table, sites=sites))

    def withhold(self, withheld: Mapping[HookPoint, str]) -> None:
        """Offer some hook points no more; the reasons are told who asks for them."""
        self._change(self.table.without(withheld))

    def _change(self, table: HookTable) -> None:
        self.table = table
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Find out anew about every graph from now on."""
        self._programs.clear()
        self._prices.clear()

    def tree(self, *, model_id: str, device: str, unpackable: str | None) -> ModelTree:
        """Describe the model to clients; `unpackable` is what the shards found out, if anything."""
        if unpackable is not None:
            self.close_attention()
        return tree.build_tree(
            self.model,
            self.table,
            model_id=model_id,
            device=device,
            tensor_parallel=self.world_size,
            unpackable=unpackable or self.table.unpackable,
        )

    def check(
        self,
        graph: Graph,
        lengths: Sequence[Sequence[int]],
        buffers: list[memoryview],
        max_new_tokens: int = 0,
        held: Mapping[str, HeldSpec] | None = None,
        decoder_lengths: Sequence[Sequence[int]] = (),
    ) -> Price:
        """Check that a graph can run on prompts of these lengths, and price it.

        Args:
            graph: as it came.
            lengths: tokens of each prompt, per invoke.
            buffers: the bytes of its constants.
            max_new_tokens: how many steps a generation may take; 0 for a trace.
            held: what the held values are that it uses, by name.
            decoder_lengths: tokens that a decoder beside an encoder reads, likewise.

        Raises:
            RequestError: it can never run; the fault names the node and the user's line.
        """
        for number, node in enumerate(graph.nodes):
            if isinstance(node, Constant):
                try:
                    check_buffer(node.tensor, buffers)
                except ValueError as error:
                    raise graph_fault(graph, number, str(error)) from None
        return self._prices.get(
            (_seedless(graph), lengths, max_new_tokens, held, decoder_lengths),
            lambda: self._check(graph, lengths, max_new_tokens, held, decoder_lengths),
        )

    def _check(
        self,
        graph: Graph,
        lengths: Sequence[Sequence[int]],
        max_new_tokens: int,
        held: Mapping[str, HeldSpec] | None,
        decoder_lengths: Sequence[Sequence[int]],
    ) -> Price:
        num_steps = max(1, max_new_tokens)
        if max_new_tokens:
            _refuse_backward(graph)
        else:
            _refuse_end(graph)
        program = self.compile(graph, len(lengths), num_steps)
        infer = partial(
            shapes.infer, program, self.model, lengths, num_steps, held, decoder_lengths
        )
        values = infer()
        price = shapes.price(program, values, [*lengths, *decoder_lengths], num_steps)
        specs = specs_kept(program, values, lambda: infer(at_last=False))
        both = zip_longest(chain(*lengths), chain(*decoder_lengths), fillvalue=0)
        retained = self._bytes_for_backward(program, [max(sides) for sides in both])
        return msgspec.structs.replace(price, value_bytes=price.value_bytes + retained, kept=specs)

    @cached_property
    def flows(self) -> frozenset[HookPoint]:
        """The inputs of modules whose gradient is that of all who use them."""
        return find_flows(self.model, packed=self.table.unpackable is None)

    @cached_property
    def _retention(self) -> Retention:
        return measure(self.model, self.table)

    def _bytes_for_backward(self, program: Program, lengths: Sequence[int]) -> int:
        """Return about how many bytes prompts keep until the backward, if there is one.

        That is what autograd saves between the first value whose gradient is asked for and the last
        hook point, and the gradients of the widest tensor on the way back.
        """
        plan = program.at(0)
        if not plan.backwards:
            return 0
        order_of = {number: order for order, nodes in plan.nodes.items() for number in nodes}
        first = min((order_of[number] for number in plan.watched), default=plan.last)
        passed = [site for site in self.table.sites.values() if first <= site.order <= plan.last]
        widest = max((site.token_bytes for site in passed if not site.square), default=0)
        return self._retention.between(first, plan.last, lengths) + 2 * widest * sum(lengths)

    def explain(self, request: str, group: Group, price: Price) -> Explanation:
        """Say what a checked request would cost, and where its rows leave or fork."""
        steps = 1 if group.decoding is None else group.decoding.max_new_tokens
        program = self.compile(group.graph, len(group.invokes), steps)
        explanation = explain(request, group, program, self.table.layers, price)
        lengths, decoder_lengths = (
            [[len(ids) for ids in prompts] for prompts in side]
            for side in (group.invokes, group.decoder)
        )
        values = shapes.infer(program, self.model, lengths, steps, group.held, decoder_lengths)
        known = {**values.decode, **values.prefill}
        infos = [shapes.describe(known.get(number)) for number in range(len(group.graph.nodes))]
        return msgspec.structs.replace(explanation, values=infos)

    def compile(self, graph: Graph, num_invokes: int, num_steps: int = 1) -> Program:
        """Order a graph's nodes along the forward, but for its seed; see `compile_graph`."""
        seedless = _seedless(graph)
        return self._programs.get(
            (seedless, num_invokes, num_steps),
            lambda: compile_graph(seedless, self.table, num_invokes, num_steps),
        )
