"""Modules of the served model, to be browsed, read, written and called without weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ndif_client.arguments import encode, recorder_of
from ndif_client.attention import PORTS, heads_of
from ndif_client.errors import UnknownNameError, graph_error
from ndif_client.operations import Operations
from ndif_client.outputs import read_hook, write_hook
from ndif_client.ports import PORT_NAMES, Ports
from ndif_client.proxy import Proxy
from ndif_client.recorder import current_recorder
from ndif_client.tree_text import tree_html, tree_text
from ndif_client.values import Owned
from ndif_client.wire.graph import CallModule, Port
from ndif_client.wire.messages import ForwardInfo, HookInfo, ModuleInfo

#: What every module has, whatever its own children are called.
_OWN_NAMES = ("skip", "at_call", *PORT_NAMES, "source")

#: Names of the residual stream, and where it is found.
_RESIDUAL: dict[str, Port] = {"resid_pre": "input", "resid": "output"}

#: At most so many names are listed in an error.
_MAX_LISTED = 24


class Envoy(Ports):
    """Stands for one module: `model.model.layers[3].mlp`.

    Its children and parameters are attributes, as in torch; `output`, `input`, `inputs` and
    `outputs` are what enters and leaves it in a forward, `source` is what happens inside. A child
    with one of those names is reached by `module["output"]`.

    Some names mean the same in every family: `embed`, `layers`, `norm` and `unembed` of the model,
    `attn`, `mlp`, `resid` (the residual stream after it) and `resid_pre` of a layer; where a module
    has a child so called, that is meant. An attention also shows its `query`, `key`, `value`,
    `scores`, `pattern` and `result`, and its `heads`.
    """

    def __init__(
        self,
        info: ModuleInfo,
        path: str = "",
        call: int = 0,
        forwards: Sequence[ForwardInfo] = (),
    ) -> None:
        super().__init__(path, info.hooks, call)
        self._info = info
        self._forwards = forwards
        self._children = {child.name: child for child in info.children}
        self._parameters = {parameter.name for parameter in info.parameters}

    # ------------------------------------------------------------ in a forward

    @property
    def heads(self) -> Any:
        """The heads of an attention: `attn.heads[3].pattern`, `attn.heads.query`; see `Heads`."""
        if "heads" in self._children or "heads" in self._parameters:
            return self._named("heads")
        found = heads_of(self._path, self._info.hooks)
        if found is None:
            raise self._no_attribute("heads")
        return found

    def skip(self, value: Any) -> None:
        """Let the model go on with `value` as if it were what the module returns.

        The module still runs, for those who share the forward, but nothing of it is seen: what is
        inside of it can't be read or written in this invoke.

        Args:
            value: of the shape of its output; a tuple of all where this is several tensors.

        Raises:
            GraphError: the value can't be its output, or its inside is used.
        """
        infos = self._hooks("output")
        parts = list(value) if isinstance(value, tuple | list) else [value]
        if len(parts) != len(infos):
            raise graph_error(
                f"{self._title()} returns {len(infos)} tensors, so it is skipped with as many, not "
                f"with {len(parts)}; to replace some of them, write its output"
            )
        current_recorder(self._title()).skip(self._path)
        for info, part in zip(infos, parts, strict=True):
            write_hook(self._path, info, part)

    def at_call(self, call: int) -> Envoy:
        """Return the same module at its `call`-th call (from 0) within one forward."""
        self._check_call(call)
        return Envoy(self._info, self._path, call, self._forwards)

    @property
    def source(self) -> Operations:
        """The operations inside of its forward, to be read and written like modules.

        `print(module.source)` shows the forward's source with each operation's name at its line.
        """
        forward = ForwardInfo(refusal="the server has not looked into its forward")
        if self._info.forward is not None:
            forward = self._forwards[self._info.forward]
        if forward.refusal:
            raise graph_error(f"{self._title()} offers no operations: {forward.refusal}")
        return Operations(forward, self._path, self._info.first_order)

    def __call__(self, *args: Any, **kwargs: Any) -> Proxy:
        """Apply the module to values: `model.lm_head(model.model.norm(h))`."""
        recorder = recorder_of(self._title(), args, kwargs)
        node = CallModule(
            self._path,
            [encode(argument, recorder) for argument in args],
            {name: encode(argument, recorder) for name, argument in kwargs.items()},
        )
        return Proxy(recorder, recorder.add(node))

    def _absent(self, port: Port) -> str:
        is_list = any(name.isdigit() for name in self._children)
        hint = "; use one of its items" if is_list else ""
        return f"{self._title()} is not called in a forward, so it has no {port}{hint}"

    # ------------------------------------------------------------ children and parameters

    def __getitem__(self, key: int | slice | str) -> Any:
        """Return an item of a list of modules, or any module or parameter by its path."""
        if isinstance(key, str):
            found: Any = self
            for name in key.split("."):
                found = found._named(name)
            return found
        items = self._items()
        if isinstance(key, slice):
            return [self._child(child) for child in items[key]]
        if not -len(items) <= key < len(items):
            raise graph_error(
                f"{self._title()}[{key}]: it has {len(items)} items (0 to {len(items) - 1})",
                UnknownNameError,
            )
        return self._child(items[key])

    def __iter__(self) -> Iterator[Envoy]:
        return (self._child(child) for child in self._items())

    def __len__(self) -> int:
        return len(self._items())

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Envoy):
            return NotImplemented
        return self._info is other._info and self._call == other._call

    def __hash__(self) -> int:
        return hash((id(self._info), self._call))

    def _items(self) -> list[ModuleInfo]:
        if not self._info.children or not all(c.name.isdigit() for c in self._info.children):
            raise graph_error(
                f"{self._title()} ({self._info.kind}) is not a list of modules; it has "
                f"{self._offered()}"
            )
        return self._info.children

    def _residual(self, name: str) -> HookInfo:
        assert self._info.residual is not None
        port, leaf = _RESIDUAL[name], self._info.residual[_RESIDUAL[name] == "output"]
        return next(hook for hook in self._hooks(port) if hook.leaf == leaf)

    def _standard(self) -> list[str]:
        """Return the names it has that mean the same in every family."""
        return [*self._info.aliases, *(_RESIDUAL if self._info.residual else ())]

    def _inside(self) -> list[str]:
        """Return what can be seen inside of it, if it is an attention."""
        return [hook.port for hook in self._info.hooks if hook.port in PORTS]

    def _child(self, info: ModuleInfo) -> Envoy:
        path = f"{self._path}.{info.name}" if self._path else info.name
        return Envoy(info, path, 0, self._forwards)

    def _named(self, name: str) -> Any:
        if name in self._children:
            return self._child(self._children[name])
        if name in self._parameters:
            path = f"{self._path}.{name}" if self._path else name
            recorder = current_recorder(path)
            return Proxy(recorder, recorder.parameter(path), Owned(path))
        if name in self._inside():
            return getattr(self.heads, name)
        if name in self._info.aliases:
            return self[self._info.aliases[name]]
        if name in _RESIDUAL and self._info.residual is not None:
            return read_hook(self._path, self._residual(name))
        raise self._no_attribute(name)

    # ------------------------------------------------------------ the rest of Python

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            return self._named(name)

        def __setattr__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                object.__setattr__(self, name, value)
            elif name in PORT_NAMES:
                self._assign(name, value)
            elif name in _OWN_NAMES:
                raise graph_error(f"{self._title()}.{name} can't be assigned; write its output")
            elif name in self._children or name in self._parameters:
                raise graph_error(
                    f"{self._title()}.{name} belongs to the model, which others use too: it can't "
                    "be replaced; write its output instead"
                )
            elif name in self._inside():
                setattr(self.heads, name, value)
            elif name in _RESIDUAL and self._info.residual is not None:
                write_hook(self._path, self._residual(name), value)
            elif name in self._info.aliases:
                raise graph_error(
                    f"{self._title()}.{name} is {self._info.aliases[name]}, which can't be "
                    "replaced; write its output instead"
                )
            else:
                raise self._no_attribute(name)

    else:

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __dir__(self) -> list[str]:
        children = [name for name in self._children if name.isidentifier()]
        inside = ["heads", *self._inside()] if self._inside() else []
        return [*_OWN_NAMES, *inside, *self._standard(), *children, *self._parameters]

    def __repr__(self) -> str:
        names = [f"{name} = {path}" for name, path in self._info.aliases.items() if name != path]
        also = f"\n# also: {', '.join(names)}" if names else ""
        return tree_text(self._info) + also

    def _repr_html_(self) -> str:
        return tree_html(self._info)

    # ------------------------------------------------------------ errors

    def _title(self) -> str:
        return self._path or self._info.kind

    def _offered(self) -> str:
        names = [*self._children, *sorted(self._parameters), *self._standard()]
        listed = ", ".join(names[:_MAX_LISTED]) or "no children"
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        return listed + more

    def _no_attribute(self, name: str) -> Exception:
        own = [*self._children, *self._parameters, *_OWN_NAMES]
        names = [*own, *self._inside(), *self._standard()]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        return graph_error(
            f"{self._title()} ({self._info.kind}) has no {name!r}{hint} it has {self._offered()}",
            UnknownNameError,
        )
