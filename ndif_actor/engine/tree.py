"""The model tree: what a client may browse without weights."""

from __future__ import annotations

from collections import defaultdict

import torch
from transformers import PreTrainedModel

from ndif_actor.engine.adapter import text_config
from ndif_actor.engine.hookpoints import HookTable
from ndif_actor.engine.names import StandardNames, standard_names
from ndif_client.wire.messages import HookInfo, ModelTree, ModuleInfo, ParameterInfo


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
    hooks: dict[str, list[HookInfo]] = defaultdict(list)
    for site in table.sites.values():
        point = site.point
        hooks[point.path].append(
            HookInfo(
                port=point.port,
                leaf=point.leaf,
                call=point.call,
                shape=list(site.shape),
                dtype=_name(site.dtype),
                order=site.order,
            )
        )
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
        root=_module("", "", model, hooks, standard_names(model, table)),
    )


def _module(
    name: str,
    path: str,
    module: torch.nn.Module,
    hooks: dict[str, list[HookInfo]],
    names: StandardNames,
) -> ModuleInfo:
    prefix = f"{path}." if path else ""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return ModuleInfo(
        name=name,
        kind=type(module).__name__,
        extra=module.extra_repr(),
        hooks=hooks.get(path, []),
        parameters=[ParameterInfo(n, list(p.shape), _name(p.dtype)) for n, p in own],
        children=[
            _module(child, prefix + child, submodule, hooks, names)
            for child, submodule in module.named_children()
        ],
        aliases=names.aliases.get(path, {}),
        residual=names.residual.get(path),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
