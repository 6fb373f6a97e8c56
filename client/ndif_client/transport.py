"""HTTP to one server: JSON replies, frames in and out, and what its refusals mean.

Knows endpoints and frames; knows nothing of graphs, proxies or results.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

import msgspec

from ndif_client.errors import ConnectError, NdifError, ProtocolError, from_fault
from ndif_client.wire.frames import Buffer, Frame, FrameError, FrameLimits, frame_bytes, read_frame
from ndif_client.wire.messages import SESSION_HEADER, FaultReply

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

#: Content type of one frame, and of a stream of them.
_FRAMES = "application/vnd.ndif.frames"

_JSON = {"Content-Type": "application/json"}

#: Bytes of one write of a large body, so that a slow server slows us down.
_WRITE_BYTES = 1 << 20

#: Bytes that may wait in the socket's reader; more gains nothing.
_READ_BYTES = 4 << 20

#: Seconds a stream may be silent before the server is asked whether it is still at it.
_SILENCE_S = 60.0


async def nothing_known() -> str:
    """Say nothing of why a server can't be reached."""
    return ""


class BrokenStreamError(Exception):
    """The connection broke, or went silent; what was sent may or may not have arrived."""


class Transport:
    """The connections to one server.

    Args:
        url: "http://host:port".
        api_key: sent as a bearer token, if given.
        timeout: seconds to wait for a connection, and for each short reply.
        explain: finds out what else is known when the server can't be reached.
    """

    def __init__(
        self, url: str, api_key: str | None, timeout: float, explain: Callable[[], Awaitable[str]]
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConnectError(
                f"{url!r} is no address; give http://HOST:PORT, or local:MODEL for a private server"
            )
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._explain = explain
        self._headers = {SESSION_HEADER: uuid.uuid4().hex}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._http: aiohttp.ClientSession | None = None

    def twin(self) -> Transport:
        """Return another one for the same session, to be opened on an event loop of its own."""
        twin = Transport(self.url, None, self.timeout, nothing_known)
        twin._headers = self._headers
        return twin

    async def open(self) -> None:
        """Make ready to connect; nothing is sent yet."""
        import aiohttp

        self._http = aiohttp.ClientSession(
            # Every waiting trace holds a connection, and none may keep a cancel from going out.
            connector=aiohttp.TCPConnector(limit=0),
            headers=self._headers,
            read_bufsize=_READ_BYTES,
        )

    async def close(self) -> None:
        """Close all connections."""
        if self._http is not None:
            await self._http.close()
            # A closed connection lets go of its socket in the loop's next turn, which may be none.
            await asyncio.sleep(0)

    async def get(self, path: str, reply: type[T]) -> T:
        """Fetch a JSON reply.

        Raises:
            NdifError: the server refuses, can't be reached, or answers something else.
        """
        async with self._short("GET", path) as response:
            return _decode_json(await response.read(), reply, self.url + path)

    async def post(self, path: str, body: Any, reply: type[T]) -> T:
        """Send JSON and fetch a JSON reply; raises as `get` does."""
        data = msgspec.json.encode(body)
        async with self._short("POST", path, data=data) as response:
            return _decode_json(await response.read(), reply, self.url + path)

    async def post_frame(self, path: str, body: Sequence[Buffer], reply: type[T]) -> T:
        """Send one frame and fetch a JSON reply; raises as `get` does."""
        async with self._short("POST", path, _as_data(body), _frame_headers(body)) as response:
            return _decode_json(await response.read(), reply, self.url + path)

    async def delete(self, path: str) -> None:
        """Delete something; raises as `get` does."""
        async with self._short("DELETE", path):
            pass

    @asynccontextmanager
    async def frames(
        self, method: str, path: str, body: Sequence[Buffer] | None = None
    ) -> AsyncIterator[FrameStream]:
        """Send one frame, if any, and read frames inside of the block.

        Raises:
            BrokenStreamError: the connection broke, before or after the reply began.
            NdifError: the server refuses, or can't be reached at all.
        """
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self.timeout, sock_read=_SILENCE_S)
        headers = _frame_headers(body) if body is not None else {"Content-Type": _FRAMES}
        data = _as_data(body) if body is not None else None
        try:
            async with self._session.request(
                method, self.url + path, data=data, headers=headers, timeout=timeout
            ) as response:
                if response.status >= 400:
                    raise _refusal(await response.read(), response.status, self.url + path)
                yield FrameStream(response)
        except aiohttp.ClientConnectorError as error:
            raise await self.unreachable(error) from error
        except (aiohttp.ClientError, ConnectionError, EOFError, TimeoutError) as error:
            raise BrokenStreamError(str(error) or type(error).__name__) from error

    async def unreachable(self, error: BaseException) -> ConnectError:
        """Return the error for a server that does not answer."""
        known = await self._explain()
        message = f"can't reach {self.url}: {str(error) or type(error).__name__}"
        unreachable = ConnectError(f"{message}\n{known}" if known else message)
        unreachable.for_good = bool(known)
        return unreachable

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._http is None or self._http.closed:
            raise ConnectError(f"the session with {self.url} has been closed")
        return self._http

    @asynccontextmanager
    async def _short(
        self,
        method: str,
        path: str,
        data: Buffer | AsyncIterator[Buffer] | None = None,
        headers: Mapping[str, str] = _JSON,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=self.timeout)
        url = self.url + path
        try:
            async with self._session.request(
                method, url, data=data, headers=headers, timeout=timeout
            ) as response:
                if response.status >= 400:
                    raise _refusal(await response.read(), response.status, url)
                yield response
        except TimeoutError as error:
            late = TimeoutError(f"no answer within {self.timeout:g} s")
            raise await self.unreachable(late) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise await self.unreachable(error) from error


class FrameStream:
    """The frames of one reply; each tensor lands in memory allocated once, at its final size."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self._content = response.content
        self._left = memoryview(b"")

    async def read(self) -> Frame:
        """Read the next frame.

        Raises:
            EOFError: there is none, or it is cut short.
            ProtocolError: what comes is no frame.
        """
        try:
            return await read_frame(self, FrameLimits())
        except FrameError as error:
            raise ProtocolError(str(error)) from error

    async def finish(self) -> None:
        """Read the end of the reply, so that its connection can be used again."""
        while await self._content.readany():
            pass

    async def read_into(self, target: memoryview) -> None:
        """Fill `target` from the body, or raise `EOFError`."""
        filled = 0
        while filled < target.nbytes:
            if not self._left:
                self._left = memoryview(await self._content.readany())
                if not self._left:
                    raise EOFError("the reply ended early")
            part = self._left[: target.nbytes - filled]
            target[filled : filled + part.nbytes] = part
            self._left = self._left[part.nbytes :]
            filled += part.nbytes


def quoted(name: str) -> str:
    """Return a model id or trace id as part of a path; slashes stay."""
    return quote(name, safe="/")


def _decode_json(data: bytes, reply: type[T], url: str) -> T:
    try:
        return msgspec.json.decode(data, type=reply)
    except msgspec.DecodeError as error:  # ValidationError is one
        raise ProtocolError(f"{url} does not answer as an ndif-actor would: {error}") from error


def _refusal(data: bytes, status: int, url: str) -> NdifError:
    try:
        fault = msgspec.json.decode(data, type=FaultReply).error
    except msgspec.DecodeError:
        text = data[:200].decode(errors="replace")
        error: NdifError = ProtocolError(f"{url} answered with status {status}: {text!r}")
    else:
        error = from_fault(fault)
    error.status = status
    return error


def _frame_headers(body: Sequence[Buffer]) -> dict[str, str]:
    return {"Content-Type": _FRAMES, "Content-Length": str(frame_bytes(body))}


def _as_data(body: Sequence[Buffer]) -> Buffer | AsyncIterator[Buffer]:
    return body[0] if len(body) == 1 else _written(body)


async def _written(body: Sequence[Buffer]) -> AsyncIterator[Buffer]:
    for piece in body:
        view = memoryview(piece)
        for start in range(0, view.nbytes, _WRITE_BYTES):
            yield view[start : start + _WRITE_BYTES]
