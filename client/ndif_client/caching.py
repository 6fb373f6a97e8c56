"""Saving what many modules return (or are given) at once: `cache = trace.cache()`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ndif_client.envoy import Envoy
from ndif_client.errors import NoValueError, UnknownNameError, graph_error
from ndif_client.outputs import HookTuple
from ndif_client.proxy import Proxy
from ndif_client.recorder import Recorder
from ndif_client.steps import Block

#: What may be cached: modules, their paths, or patterns such as "model.layers.*.mlp".
Modules = Envoy | str | Iterable[Envoy | str]


class Cache(Mapping[str, Any]):
    """What modules have returned, by module path, when the trace has run.

    `cache["model.layers.3.mlp"]` (or the module itself as key) is its output, a tuple where that is
    several tensors; `cache.inputs[...]` what it was given, if that was asked for. It is read at
    the end of the trace's block, so it shows what the model has really computed, changes included.
    """

    def __init__(
        self, model: Envoy, modules: Modules | None, *, inputs: bool, outputs: bool
    ) -> None:
        self._residual = modules is None
        self._modules = _layers(model) if modules is None else find_modules(model, modules)
        self._wants = {"inputs": inputs, "outputs": outputs}
        if not inputs and not outputs:
            raise graph_error("cache(inputs=False, outputs=False) would save nothing")
        self._saved: dict[str, dict[str, Any]] = {"inputs": {}, "outputs": {}}

    def record(self, recorder: Recorder, invoke: int, block: Block, name: str) -> None:
        """Record the reads and saves, for the invoke and the steps that were current."""
        with recorder.recording(invoke), recorder.again(block):
            for path, module in self._modules.items():
                for kind, hooks in (("inputs", "input"), ("outputs", "output")):
                    if self._wants[kind]:
                        self._saved[kind][path] = self._read(module, hooks)
        layout: dict[str, Any] = {
            kind: {path: _layout(value) for path, value in saved.items()}
            for kind, saved in self._saved.items()
            if saved
        }
        recorder.name(name, layout if len(layout) > 1 else next(iter(layout.values())))

    @property
    def inputs(self) -> Mapping[str, Any]:
        """What the modules were given: their first tensor, by path."""
        return {path: _value(saved) for path, saved in self._saved["inputs"].items()}

    @property
    def outputs(self) -> Mapping[str, Any]:
        """What the modules have returned, by path."""
        return {path: _value(saved) for path, saved in self._saved["outputs"].items()}

    def __getitem__(self, key: str | Envoy) -> Any:
        path = key._path if isinstance(key, Envoy) else key
        if path not in self._modules:
            raise KeyError(f"{path!r} is not in this cache; in it are {list(self._modules)}")
        kind = "outputs" if self._wants["outputs"] else "inputs"
        if path not in self._saved[kind]:
            raise NoValueError(
                "a cache is read at the end of the trace's block, and has values when that has "
                "run; in the block, read the module itself"
            )
        return _value(self._saved[kind][path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __repr__(self) -> str:
        return f"Cache({len(self)} modules: {', '.join(list(self._modules)[:4])}, ...)"

    def _read(self, module: Envoy, hooks: str) -> Any:
        if self._residual and hooks == "output":
            return module.resid.save()
        found = getattr(module, hooks)
        if isinstance(found, HookTuple):
            return tuple(_saved(part) for part in found)
        return found.save()


def _saved(part: Any) -> Any:
    return tuple(_saved(inner) for inner in part) if isinstance(part, HookTuple) else part.save()


def _value(saved: Any) -> Any:
    return tuple(map(_value, saved)) if isinstance(saved, tuple) else saved.value


def _layout(saved: Any) -> Any:
    if isinstance(saved, tuple):
        return [_layout(part) for part in saved]
    assert isinstance(saved, Proxy) and saved._saved is not None
    return saved._saved


def _layers(model: Envoy) -> dict[str, Envoy]:
    layers = model._info.aliases.get("layers")
    found = {} if layers is None else {layer._path: layer for layer in model[layers]}
    if not found or any(layer._info.residual is None for layer in found.values()):
        raise graph_error(
            "which layers this model has can't be told; name the modules: cache(['...'])"
        )
    return found


def find_modules(model: Envoy, modules: Modules) -> dict[str, Envoy]:
    """Return the modules that are meant, by path.

    Raises:
        UnknownNameError: there are none such.
    """
    wanted = [modules] if isinstance(modules, str | Envoy) else list(modules)
    found: dict[str, Envoy] = {}
    for one in wanted:
        if isinstance(one, Envoy):
            found[one._path] = one
        elif not isinstance(one, str):
            raise graph_error(
                f"{type(one).__name__} is no module; of other values, give each to an attribute of "
                "the trace, or .save() it"
            )
        elif "*" in one or "?" in one or "[" in one:
            matching = {path: each for path, each in _called(model) if _matches(path, one)}
            if not matching:
                matching = {each._path: each for each in _by_standard_names(model, one)}
            if not matching:
                raise graph_error(f"no module that is called matches {one!r}", UnknownNameError)
            found.update(matching)
        else:
            module = model[one] if one else model
            if not isinstance(module, Envoy):
                raise graph_error(f"{one!r} is a parameter, no module", UnknownNameError)
            found[module._path] = module
    return found


def _called(module: Envoy) -> Iterator[tuple[str, Envoy]]:
    if module._info.hooks:
        yield module._path, module
    for child in module._info.children:
        yield from _called(module._child(child))


def _by_standard_names(model: Envoy, pattern: str) -> list[Envoy]:
    """Return the modules that a pattern means by the names that mean the same everywhere."""
    found = [model]
    for step in pattern.split("."):
        further: list[Envoy] = []
        for module in found:
            names = [name for name in module._children if fnmatchcase(name, step)]
            standard = [name for name in module._info.aliases if fnmatchcase(name, step)]
            further += [module[name] for name in names or standard]
        found = further
    return [module for module in found if module._info.hooks]


def _matches(path: str, pattern: str) -> bool:
    own, wanted = path.split("."), pattern.split(".")
    return len(own) == len(wanted) and all(map(fnmatchcase, own, wanted))
