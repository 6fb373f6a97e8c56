"""From an address to an open session: over HTTP, or with a private server of its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any

from ndif_client.errors import NdifError, ProtocolError
from ndif_client.local import LocalServer
from ndif_client.session import Session
from ndif_client.transport import Transport, nothing_known, quoted
from ndif_client.wire.messages import ModelList, ModelTree
from ndif_client.wire.tensors import ArrayKind

_LOCAL = "local:"


class Connecting:
    """What `connect` returns: use it with `async with`, or `await` it."""

    def __init__(self, opening: Callable[[], Coroutine[Any, Any, Session]]) -> None:
        self._open = opening
        self._session: Session | None = None

    def __await__(self) -> Generator[Any, None, Session]:
        return self._open().__await__()

    async def __aenter__(self) -> Session:
        self._session = await self
        return self._session

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()


def connect(
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    tensors: ArrayKind = "auto",
    timeout: float = 30.0,
    serve_options: Sequence[str] = (),
) -> Connecting:
    """Connect to a server, or start a private one.

    Args:
        url: "http://HOST:PORT", or "local:MODEL" for a server of one's own that ends with the
            session; MODEL is a folder, a hub id or "demo".
        model: which model, where the server has several.
        api_key: if the server wants one.
        tensors: what results are: "torch", "numpy", or "auto" for torch where it is installed.
        timeout: seconds to wait for a connection and for short replies; traces take their time.
        serve_options: further options of `ndif-actor serve` for a private server, such as
            `("--dtype", "float32")`.

    Returns:
        Something to use as `async with connect(...) as session:` or `session = await connect(...)`.

    Raises:
        ConnectError: the server can't be reached.
        ServerStartError: the private server did not start.
        AuthError, UnavailableError: the server refuses.
    """
    if tensors == "auto":
        tensors = "torch" if importlib.util.find_spec("torch") is not None else "numpy"
    elif tensors == "torch" and importlib.util.find_spec("torch") is None:
        raise NdifError("tensors='torch' needs torch: pip install torch, or use tensors='numpy'")

    async def opening() -> Session:
        return await _open(url, model, api_key, tensors, timeout, serve_options)

    return Connecting(opening)


async def _open(
    url: str,
    model: str | None,
    api_key: str | None,
    tensors: ArrayKind,
    timeout_s: float,
    serve_options: Sequence[str],
) -> Session:
    async with AsyncExitStack() as stack:
        explain = nothing_known
        if url.startswith(_LOCAL):
            server = LocalServer(url.removeprefix(_LOCAL), serve_options)
            stack.push_async_callback(server.stop)
            url = await server.start()
            explain = server.explain
        transport = Transport(url, api_key, timeout_s, explain)
        stack.push_async_callback(transport.close)
        await transport.open()
        name = model or await _only_model(transport)
        tree = await transport.get(f"/v1/models/{quoted(name)}", ModelTree)
        session = Session(transport, tree, tensors)
        session._resources = stack.pop_all()
        return session


async def _only_model(transport: Transport) -> str:
    offered = (await transport.get("/v1/models", ModelList)).data
    if len(offered) != 1:
        names = ", ".join(repr(summary.id) for summary in offered) or "none"
        raise ProtocolError(
            f"{transport.url} offers several models or none ({names}): connect(url, model=...)"
        )
    return offered[0].id
