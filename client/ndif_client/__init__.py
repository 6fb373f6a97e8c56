"""The researcher's client: connect to a shared model, write an experiment, get tensors back.

    async with connect("http://127.0.0.1:8000") as session:
        async with session.trace("The Eiffel Tower is in") as trace:
            hidden = session.model.model.layers[10].output.save()
        hidden.value

Needs neither torch nor transformers. For scripts without `await` see `ndif_client.blocking`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ndif_client import errors, ops
from ndif_client.connecting import connect
from ndif_client.envoy import Envoy
from ndif_client.errors import NdifError
from ndif_client.explanation import Explanation
from ndif_client.generation import Generation
from ndif_client.held import Handle
from ndif_client.progress import Progress
from ndif_client.proxy import Proxy
from ndif_client.results import Result
from ndif_client.session import Session
from ndif_client.streaming import Token
from ndif_client.trace import Trace
from ndif_client.wire.messages import Completion

if TYPE_CHECKING:
    from ndif_client.chain import Chain
    from ndif_client.edits import Edit

#: What is imported when it is first asked for, and where it is.
_LATER = {"Chain": "ndif_client.chain", "Edit": "ndif_client.edits"}

__all__ = [
    "Chain",
    "Completion",
    "Edit",
    "Envoy",
    "Explanation",
    "Generation",
    "Handle",
    "NdifError",
    "Progress",
    "Proxy",
    "Result",
    "Session",
    "Token",
    "Trace",
    "connect",
    "errors",
    "ops",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'ndif_client' has no attribute {name!r}")
