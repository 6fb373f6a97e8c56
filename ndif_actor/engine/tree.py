"""The model tree: what a client may browse without weights."""

from __future__ import annotations

from collections import defaultdict

import msgspec
import torch
from transformers import PreTrainedModel

from ndif_actor.engine.adapter import text_config
from ndif_actor.engine.hookpoints import HookTable, Site
from ndif_actor.engine.moments import Moment
from ndif_actor.engine.names import standard_names
from ndif_actor.engine.operations import Unoffered, find
from ndif_client.wire.messages import (
    ForwardInfo,
    HookInfo,
    ModelTree,
    ModuleInfo,
    OperationInfo,
    ParameterInfo,
)


def build_tree(
    model: PreTrainedModel,
    table: HookTable,
    *,
    model_id: str,
    device: str,
    tensor_parallel: int,
    unpackable: str | None,
) -> ModelTree:
    """Describe a model built without weights.

    Args:
        model: its modules and full shapes.
        table: its hook points.
        model_id: what clients call it.
        device: "cpu" or "cuda".
        tensor_parallel: number of shards.
        unpackable: why its requests can't share a forward, or None.
    """
    config = text_config(model.config)
    modules = _Modules(model, table)
    root = modules.describe("", "", model)
    return ModelTree(
        id=model_id,
        kind=type(model).__name__,
        dtype=_name(model.dtype),
        device=device,
        tensor_parallel=tensor_parallel,
        packed=unpackable is None,
        unpackable=unpackable,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        root=root,
        forwards=modules.forwards,
    )


class _Modules:
    """Describes modules, and each forward once, however many modules share it.

    Attributes:
        forwards: those described so far.
    """

    def __init__(self, model: PreTrainedModel, table: HookTable) -> None:
        self.forwards: list[ForwardInfo] = []
        self._names = standard_names(model, table)
        self._numbers: dict[bytes, int] = {}
        self._moments = table.moments
        self._sites: dict[tuple[str, str], list[Site]] = defaultdict(list)
        self._withheld: dict[tuple[str, str], set[str]] = defaultdict(set)
        for point, site in table.sites.items():
            self._sites[point.path, point.operation].append(site)
        for point, why in table.withheld.items():
            self._withheld[point.path, point.operation].add(why)

    def describe(self, name: str, path: str, module: torch.nn.Module) -> ModuleInfo:
        prefix = f"{path}." if path else ""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        first_order = self._moments.get(Moment(path, "input", 0), 0)
        return ModuleInfo(
            name=name,
            kind=type(module).__name__,
            extra=module.extra_repr(),
            hooks=[_hook(site, 0) for site in self._sites.get((path, ""), [])],
            forward=self._number(self._forward(path, module, first_order)),
            first_order=first_order,
            parameters=[ParameterInfo(n, list(p.shape), _name(p.dtype)) for n, p in own],
            children=[
                self.describe(child, prefix + child, submodule)
                for child, submodule in module.named_children()
            ],
            aliases=self._names.aliases.get(path, {}),
            residual=self._names.residual.get(path),
        )

    def _forward(self, path: str, module: torch.nn.Module, first_order: int) -> ForwardInfo:
        try:
            rewritten = find(module)
        except Unoffered as error:
            return ForwardInfo(refusal=str(error))
        operations = [
            OperationInfo(
                name=operation.name,
                line=operation.line,
                hooks=[_hook(site, first_order) for site in self._sites.get(key, [])],
                withheld="; ".join(sorted(self._withheld.get(key, []))),
            )
            for operation in rewritten.operations
            if (key := (path, operation.name)) in self._sites or key in self._withheld
        ]
        return ForwardInfo(source=rewritten.source, operations=operations)

    def _number(self, forward: ForwardInfo) -> int:
        number = self._numbers.setdefault(msgspec.msgpack.encode(forward), len(self.forwards))
        if number == len(self.forwards):
            self.forwards.append(forward)
        return number


def _hook(site: Site, first_order: int) -> HookInfo:
    """Describe a hook point; the operation is named by what holds it."""
    return HookInfo(
        port=site.point.port,
        leaf=site.point.leaf,
        call=site.point.call,
        shape=list(site.shape),
        dtype=_name(site.dtype),
        order=site.order - first_order,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
