"""Every error of the server, by whose fault it is.

ServerError
|-- RequestError     the request can't be served as it is; carries the `Fault` its author sees
|-- ModelError       this model can't be served as asked (heads, plan, files)
|-- ReplicaLost      a shard died or stalled; the replica restarts
`-- LaunchError      processes could not be started or joined
"""

from __future__ import annotations

from ndif_client.wire.messages import Fault


class ServerError(Exception):
    """Base of everything this server raises on purpose."""


class RequestError(ServerError):
    """One request can't be served; `fault` goes to its author, nobody else is touched."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class ModelError(ServerError):
    """The model can't be served as asked; raised before weights are loaded where possible."""


class ReplicaLost(ServerError):
    """A shard of the replica died, stalled, or left the group."""


class LaunchError(ServerError):
    """The shards could not be started, or did not join in time."""
