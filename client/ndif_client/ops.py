"""The catalogue's operations as functions: `ops.where(mask, h, 0)`, `ops.cat([a, b], -1)`.

They take what torch's functions of the same names take. `dir(ops)` lists them.
"""

from __future__ import annotations

import difflib
from typing import Any

from ndif_client.arguments import signature
from ndif_client.errors import UnknownNameError, graph_error
from ndif_client.operators import apply_any
from ndif_client.proxy import Proxy
from ndif_client.wire.catalogue import ALIASES, CATALOGUE


def _function(name: str) -> Any:
    entry = CATALOGUE[ALIASES.get(name, name)]

    def function(*args: Any, **kwargs: Any) -> Proxy:
        return apply_any(name, args, kwargs)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = entry.doc
    function.__signature__ = signature(entry)  # type: ignore[attr-defined]
    return function


_FUNCTIONS = {name: _function(name) for name in sorted((*CATALOGUE, *ALIASES))}


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if name.startswith("_"):
        raise AttributeError(name)
    near = difflib.get_close_matches(name, _FUNCTIONS, n=1)
    hint = f"; did you mean ops.{near[0]}?" if near else "; dir(ndif_client.ops) lists what is"
    raise graph_error(f"{name!r} is not in the catalogue of operations{hint}", UnknownNameError)


def __dir__() -> list[str]:
    return list(_FUNCTIONS)
