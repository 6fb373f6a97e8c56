"""Modules of the served model, to be browsed, read, written and called without weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ndif_client.arguments import encode, recorder_of
from ndif_client.errors import UnknownNameError, graph_error
from ndif_client.operations import Operations
from ndif_client.ports import PORT_NAMES, Ports
from ndif_client.proxy import Proxy
from ndif_client.recorder import current_recorder
from ndif_client.tree_text import tree_html, tree_text
from ndif_client.values import Owned
from ndif_client.wire.graph import CallModule, Port
from ndif_client.wire.messages import ForwardInfo, ModuleInfo

#: What every module has, whatever its own children are called.
_OWN_NAMES = ("at_call", *PORT_NAMES, "source")

#: At most so many names are listed in an error.
_MAX_LISTED = 24


class Envoy(Ports):
    """Stands for one module: `model.model.layers[3].mlp`.

    Its children and parameters are attributes, as in torch; `output`, `input`, `inputs` and
    `outputs` are what enters and leaves it in a forward, `source` is what happens inside. A child
    with one of those names is reached by `module["output"]`.
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

    def _items(self) -> list[ModuleInfo]:
        if not self._info.children or not all(c.name.isdigit() for c in self._info.children):
            raise graph_error(
                f"{self._title()} ({self._info.kind}) is not a list of modules; it has "
                f"{self._offered()}"
            )
        return self._info.children

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
            else:
                raise self._no_attribute(name)

    else:

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __dir__(self) -> list[str]:
        children = [name for name in self._children if name.isidentifier()]
        return [*_OWN_NAMES, *children, *self._parameters]

    def __repr__(self) -> str:
        return tree_text(self._info)

    def _repr_html_(self) -> str:
        return tree_html(self._info)

    # ------------------------------------------------------------ errors

    def _title(self) -> str:
        return self._path or self._info.kind

    def _offered(self) -> str:
        names = [*self._children, *sorted(self._parameters)]
        listed = ", ".join(names[:_MAX_LISTED]) or "no children"
        more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
        return listed + more

    def _no_attribute(self, name: str) -> Exception:
        names = [*self._children, *self._parameters, *_OWN_NAMES]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        return graph_error(
            f"{self._title()} ({self._info.kind}) has no {name!r}{hint} it has {self._offered()}",
            UnknownNameError,
        )
