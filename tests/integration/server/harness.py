"""Real server processes, and a client that speaks the bare wire, for tests."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import numpy as np
import psutil

from ndif_client.wire.frames import Frame, FrameLimits, encode_frame, read_frame
from ndif_client.wire.graph import (
    Apply,
    Constant,
    Graph,
    HookPoint,
    Invoke,
    Node,
    ReadHook,
    Ref,
    Save,
    Source,
)
from ndif_client.wire.messages import (
    Done,
    Event,
    Failed,
    FaultReply,
    Submission,
    TraceRequest,
)
from ndif_client.wire.tensors import TensorSpec, import_array

#: Seconds a server may take to be ready on a busy machine.
START_S = 90.0

_READY = re.compile(r"ndif-actor ready: (http://\S+) model=(\S+) tp=(\d+) device=cpu dtype=(\S+)")

Array = np.ndarray[Any, Any]


class Server:
    """A running `ndif-actor`; its stderr goes to a file that failed tests show."""

    def __init__(self, arguments: Sequence[str], log: Path, **environment: str) -> None:
        self.log = log
        self.url = ""
        self._stderr = log.open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ndif_actor.cli", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def wait_until_ready(self) -> str:
        """Return the URL of the ready line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = _READY.match(line)
        assert match, f"expected the ready line, got {line!r}:\n{self.log.read_text()}"
        self.url = match[1]
        return self.url

    def shards(self) -> list[psutil.Process]:
        """Return the shard processes, by rank."""
        return sorted(psutil.Process(self.process.pid).children(), key=lambda child: child.pid)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 40.0) -> int:
        """Return the exit status."""
        return self.process.wait(timeout_s)

    def stop(self) -> None:
        """End it, whatever state it is in, and see that nothing is left of it."""
        shards = self.shards() if self.process.poll() is None else []
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                raise
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self._stderr.close()
        assert gone(shards), "shards outlive their server"


@contextmanager
def running(model: Path, log: Path, *options: str, **environment: str) -> Iterator[Server]:
    """Start `ndif-actor serve MODEL` on a free port and end it afterwards."""
    server = Server(["serve", str(model), "--port", "0", *options], log, **environment)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def gone(processes: Sequence[psutil.Process], timeout_s: float = 10.0) -> bool:
    """Whether all these processes have ended, or do so soon."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return not alive


# ---------------------------------------------------------------- requests


def trace(
    model: str,
    nodes: Sequence[Node],
    *prompts: str | list[int],
    sources: Sequence[Source] = (),
    request: str | None = None,
) -> TraceRequest:
    """Return a request with one invoke."""
    graph = Graph(list(nodes), list(sources), [0] * len(nodes) if sources else [])
    return TraceRequest(
        id=request or uuid.uuid4().hex,
        model=model,
        invokes=[Invoke(list(prompts) or ["a prompt"])],
        graph=graph,
    )


def save_layer(layer: int) -> list[Node]:
    """Return the nodes that save the output of a Llama layer as "h"."""
    return [ReadHook(HookPoint(f"model.layers.{layer}", "output")), Save(Ref(0), "h")]


@cache
def _side() -> int:
    """Return the side of a square matrix whose product with itself takes this machine 50 ms."""
    known = np.zeros((1024, 1024), np.float32)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        np.matmul(known, known)
        seconds.append(time.perf_counter() - began)
    side = 1024 * (0.05 / min(seconds)) ** (1 / 3)
    return 64 * round(min(max(side, 1024), 2048) / 64)


def slow(products: int) -> tuple[list[Node], list[memoryview]]:
    """Return nodes that keep a forward busy for roughly 50 ms a product, and their constant."""
    side = _side()
    nodes: list[Node] = [Constant(TensorSpec("float32", (side, side), 0))]
    for number in range(products):
        nodes.append(Apply("matmul", [Ref(number), Ref(0)]))
    nodes.append(Apply("sum", [Ref(products)]))
    nodes.append(Save(Ref(products + 1), "sum"))
    return nodes, [np.zeros((side, side), np.float32).data.cast("B")]


class Outcome(msgspec.Struct):
    """All that came back for one submission, in order of arrival."""

    events: list[Event] = []
    buffers: dict[str, list[memoryview]] = {}

    def of(self, request: TraceRequest) -> list[str]:
        """Return the kinds of events of one request."""
        return [type(event).__name__ for event in self.events if event.id == request.id]

    def done(self, request: TraceRequest) -> Done:
        last = self._last(request)
        assert isinstance(last, Done), last
        return last

    def failed(self, request: TraceRequest) -> Failed:
        last = self._last(request)
        assert isinstance(last, Failed), last
        return last

    def value(self, request: TraceRequest, name: str) -> Array:
        """Return a saved tensor."""
        saved = next(saved for saved in self.done(request).tensors if saved.name == name)
        buffer = self.buffers[request.id][saved.tensor.buffer]
        array: Array = import_array(saved.tensor, buffer, "numpy")
        return array

    def _last(self, request: TraceRequest) -> Event:
        return [event for event in self.events if event.id == request.id][-1]


class Refused(Exception):
    """A reply with a status of 400 or more."""

    def __init__(self, status: int, headers: dict[str, str], reply: FaultReply) -> None:
        super().__init__(f"{status}: {reply.error.message}")
        self.status = status
        self.headers = headers
        self.fault = reply.error


class Body:
    """The body of a reply as `read_frame` wants it."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content

    async def read_into(self, target: memoryview) -> None:
        try:
            target[:] = await self._content.readexactly(target.nbytes)
        except asyncio.IncompleteReadError as error:
            raise EOFError("clean" if not error.partial else "cut short") from None


class Wire:
    """A client without any comfort."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.http = http
        self.url = url

    @asynccontextmanager
    async def post(
        self,
        *requests: TraceRequest,
        buffers: Sequence[memoryview] = (),
        headers: dict[str, str] | None = None,
    ) -> AsyncIterator[AsyncIterator[tuple[Event, Frame]]]:
        """Send a submission and give the events as they come."""
        header = msgspec.msgpack.encode(Submission(requests=list(requests)))
        data = b"".join(encode_frame(header, buffers))
        target = f"{self.url}/v1/traces"
        async with self.http.post(target, data=data, headers=headers) as reply:
            if reply.status != 200:
                raise await refusal(reply)
            yield events_of(reply)

    async def run(
        self, *requests: TraceRequest, buffers: Sequence[memoryview] = (), **headers: str
    ) -> Outcome:
        """Send a submission and return everything that comes back."""
        outcome = Outcome()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.post(*requests, buffers=buffers, headers=named) as events:
            async for event, frame in events:
                outcome.events.append(event)
                outcome.buffers[event.id] = frame.buffers
        return outcome

    async def fetch(self, request: str) -> tuple[int, Event]:
        """GET a trace; return status and event."""
        async with self.http.get(f"{self.url}/v1/traces/{request}") as reply:
            if reply.status >= 400:
                raise await refusal(reply)
            events = [event async for event, _ in events_of(reply)]
            return reply.status, events[0]

    async def delete(self, request: str) -> int:
        async with self.http.delete(f"{self.url}/v1/traces/{request}") as reply:
            return reply.status

    async def get_json(self, path: str) -> tuple[int, Any]:
        async with self.http.get(self.url + path) as reply:
            return reply.status, await reply.json()

    async def until_ready(self, timeout_s: float = START_S) -> None:
        """Wait until /ready says so."""
        deadline = time.monotonic() + timeout_s
        while (await self.get_json("/ready"))[0] != 200:
            assert time.monotonic() < deadline, await self.get_json("/ready")
            await asyncio.sleep(0.1)


async def refusal(reply: aiohttp.ClientResponse) -> Refused:
    fault = msgspec.json.decode(await reply.read(), type=FaultReply)
    return Refused(reply.status, dict(reply.headers), fault)


async def events_of(reply: aiohttp.ClientResponse) -> AsyncIterator[tuple[Event, Frame]]:
    body = Body(reply.content)
    while True:
        try:
            frame = await read_frame(body, FrameLimits())
        except EOFError as error:
            assert error.args == ("clean",)
            return
        yield msgspec.msgpack.decode(frame.header, type=Event), frame


@asynccontextmanager
async def wire(server: Server) -> AsyncIterator[Wire]:
    port = int(server.url.rpartition(":")[2])
    others = _connections_to(port)
    async with aiohttp.ClientSession() as http:
        yield Wire(http, server.url)
    # A connection that is closed while it sends, as one whose request was refused, lets go of its
    # socket only when the server does.
    async with asyncio.timeout(20):
        while _connections_to(port) - others:
            await asyncio.sleep(0.01)


def _connections_to(port: int) -> set[int]:
    """Return the local ports of this process's connections to a server."""
    every = psutil.Process().net_connections("tcp4")
    return {each.laddr.port for each in every if each.raddr and each.raddr.port == port}
