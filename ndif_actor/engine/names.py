"""Names that mean the same in every family: embed, layers, attn, mlp, norm, unembed, resid.

Found by what modules are and do, not by what they are called; what can't be told is left out.
"""

from __future__ import annotations

import msgspec
import torch
from transformers import PreTrainedModel

from ndif_actor.engine.adapter import text_config
from ndif_actor.engine.hookpoints import HookTable
from ndif_client.wire.graph import Port

_Shape = tuple[int | str, ...]


class StandardNames(msgspec.Struct, frozen=True):
    """Standard names of a model's modules.

    Attributes:
        aliases: for a module's path, the standard names of modules below it and their paths from
            there.
        residual: for a layer's path, the leaves of its input and output that are the residual
            stream.
    """

    aliases: dict[str, dict[str, str]]
    residual: dict[str, tuple[str, str]]


def standard_names(model: PreTrainedModel, table: HookTable) -> StandardNames:
    """Find the standard names of a model built without weights."""
    paths = {module: path for path, module in model.named_modules()}
    root: dict[str, str] = {}
    aliases = {"": root}
    residual: dict[str, tuple[str, str]] = {}
    ends = {"embed": model.get_input_embeddings(), "unembed": model.get_output_embeddings()}
    root.update({name: paths[module] for name, module in ends.items() if module in paths})
    layers = _layers(model)
    # Of an encoder and a decoder, neither is "the layers".
    if layers is None or model.config.is_encoder_decoder:
        return StandardNames(aliases, residual)
    root["layers"] = layers
    norm = _norm_after(model, layers)
    if norm is not None:
        root["norm"] = norm
    for number, layer in model.get_submodule(layers).named_children():
        path = f"{layers}.{number}"
        wide = ("batch", "sequence", text_config(model.config).hidden_size)
        aliases[path] = _parts(path, layer, table, wide)
        leaves = _residual(path, table, wide)
        if leaves is not None:
            residual[path] = leaves
    return StandardNames(aliases, residual)


def _layers(model: PreTrainedModel) -> str | None:
    """Return the list of as many modules as the model has layers."""
    count = text_config(model.config).num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return path
    return None


def _norm_after(model: PreTrainedModel, layers: str) -> str | None:
    """Return the last norm beside the layers."""
    owner, _, own = layers.rpartition(".")
    names = [name for name, _ in model.get_submodule(owner).named_children()]
    after = names[names.index(own) + 1 :]
    norms = [n for n in after if _is_norm(model.get_submodule(owner).get_submodule(n))]
    if not norms:
        return None
    return f"{owner}.{norms[-1]}" if owner else norms[-1]


def _parts(path: str, layer: torch.nn.Module, table: HookTable, wide: _Shape) -> dict[str, str]:
    found: dict[str, str] = {}
    attention = [p for p in table.attention if p.startswith(f"{path}.")]
    if len(attention) == 1:
        found["attn"] = attention[0].removeprefix(f"{path}.")
    sizes = {
        name: sum(parameter.numel() for parameter in child.parameters())
        for name, child in layer.named_children()
        if not _is_norm(child)
        and any(True for _ in child.children())
        and not any(p == f"{path}.{name}" or p.startswith(f"{path}.{name}.") for p in attention)
        # BERT's layers have the two halves of an MLP side by side, and no module that is one.
        and _first_shapes(f"{path}.{name}", table) == [wide, wide]
    }
    if attention and any(sizes.values()):
        found["mlp"] = max(sizes, key=sizes.__getitem__)
    return found


def _residual(path: str, table: HookTable, wide: _Shape) -> tuple[str, str] | None:
    """Return the leaves of a module's input and output that are as wide as the model, if any."""

    def first(port: Port) -> str | None:
        mine = (path, port, 0, "")
        for point, site in table.sites.items():
            if (point.path, point.port, point.call, point.operation) == mine and site.shape == wide:
                return point.leaf
        return None

    entered, left = first("input"), first("output")
    return None if entered is None or left is None else (entered, left)


def _first_shapes(path: str, table: HookTable) -> list[_Shape]:
    """Return the shapes of the first tensors that enter and leave a module."""
    shapes: dict[Port, _Shape] = {}
    for point, site in table.sites.items():
        if (point.path, point.call, point.operation) == (path, 0, ""):
            shapes.setdefault(point.port, site.shape)
    return list(shapes.values())


def _is_norm(module: torch.nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
