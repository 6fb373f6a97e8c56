"""A load test from beginning to end: clients connect, try each scenario once, put levels on."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import aiohttp
import msgspec

from bench.load import scenarios
from bench.load.asking import Log, Planned
from bench.load.live import Display
from bench.load.loops import arrivals, beside, closed, play
from bench.load.noise import busy_cores
from bench.load.recording import check_fit, hurried, read_recording
from bench.load.run import Level, ServerFacts, Settings
from bench.load.scenarios import Request, Sizes
from bench.load.summary import summarise
from ndif_client import connect
from ndif_client.errors import AuthError, ConnectError, NdifError
from ndif_client.session import Session

#: Clients that connect at the same time: each fetches the whole model tree.
_CONNECTING = 8

#: Clients that a recording may bring; more users than that share them.
_MOST_CLIENTS = 1024

#: Seconds a server may take to say what it is.
_VERSION_S = 10.0


class LoadError(Exception):
    """The load test can't be done as asked; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done.

    Attributes:
        url, model, keys: of the server; users take the keys in turn.
        settings: of the whole run.
        levels: users of each level in a closed loop, arrivals a second in an open one.
        users: clients that share the arrivals of an open loop.
        recording: to replay.
    """

    url: str
    settings: Settings
    model: str | None = None
    keys: Sequence[str] = ()
    levels: Sequence[float] = ()
    users: int = 1
    recording: Path | None = None


@dataclass
class Outcome:
    """What has been found so far; a run that is interrupted leaves its finished levels here."""

    server: ServerFacts | None = None
    levels: list[Level] = field(default_factory=list)
    sent: list[Planned] = field(default_factory=list)


async def drive(job: Job, outcome: Outcome, display: Display) -> None:
    """Do a load test.

    Args:
        job: what is to be done.
        outcome: filled level by level.
        display: told how far it is.

    Raises:
        LoadError: the server can't be used, or refuses a scenario.
        RecordingError: the recording can't be read, or does not fit the model.
    """
    settings = job.settings
    planned = read_recording(job.recording) if job.recording is not None else []
    planned = hurried(planned, settings.speed)
    users = max(_users(job, planned))
    _allow_sockets(users)
    async with _clients(job, users) as sessions:
        outcome.server = await _facts(sessions[0])
        sizes = _sizes(sessions[0], settings)
        check_fit(planned, sizes)
        await _rehearse(sessions[0], _examples(settings, sizes, planned))
        for number, level in enumerate(job.levels or [0.0]):
            load = _Load(job, level, number, sizes, planned)
            outcome.levels.append(await _put(load, sessions, outcome, display))


class _Load:
    """One level before it runs."""

    def __init__(
        self, job: Job, level: float, number: int, sizes: Sizes, planned: Sequence[Planned]
    ) -> None:
        settings = job.settings
        self.settings = settings
        self.users = int(level) if settings.loop == "closed" else job.users
        self.rate = level if settings.loop == "open" else None
        self.window = settings.window
        # Levels differ in their prompts too: a cache of prefixes must not help the later ones.
        self.seed = f"{settings.seed} level {number}"
        self.planned = list(planned)
        self._sizes = sizes
        if self.rate is not None:
            end_s = self.window.end_s
            self.planned = arrivals(self.rate, self.users, end_s, self.draw, self.seed)
        elif settings.loop == "replay":
            self._replay()

    def draw(self, rng: Random) -> Request:
        return scenarios.draw(self.settings.weights, rng, self._sizes)

    def _replay(self) -> None:
        last_s = self.planned[-1].at_s
        self.users = len({one.user for one in self.planned})
        self.rate = len(self.planned) / last_s if last_s else float(len(self.planned))
        # All of it is sent, however long a run would be otherwise.
        duration_s = max(last_s + 1e-3 - self.window.warmup_s, 1e-3)
        self.window = msgspec.structs.replace(self.window, duration_s=duration_s)


async def _put(
    load: _Load, sessions: Sequence[Session], outcome: Outcome, display: Display
) -> Level:
    busy_before = await busy_cores()
    log, settings = Log(), load.settings
    cpu_s, began_s = time.process_time(), time.perf_counter()
    if settings.loop == "closed":
        own = sessions[: load.users]
        work = closed(own, load.draw, settings.think_s, load.window, log, load.seed)
    else:
        work = play(sessions, load.planned, load.window, log)
    await beside(work, display.follow(load.users, load.rate, load.window, log))
    cpu_s, took_s = time.process_time() - cpu_s, time.perf_counter() - began_s
    outcome.sent = log.sent
    rows = sorted(log.rows, key=lambda row: row.intended_s)
    level = Level(
        users=load.users,
        rate=load.rate,
        window=load.window,
        harness_cpu=cpu_s / took_s,
        busy_before=busy_before,
        summary=summarise(rows, load.window, settings.slo_s),
        requests=rows,
    )
    display.ended(level)
    return level


# ---------------------------------------------------------------- before the first level


def _users(job: Job, planned: Sequence[Planned]) -> list[int]:
    if job.settings.loop == "closed":
        return [int(level) for level in job.levels]
    return [min(len({one.user for one in planned}), _MOST_CLIENTS) or job.users]


def _allow_sockets(users: int) -> None:
    """Raise the soft limit of open files: every request under way holds a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, 16 * users + 16384)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@asynccontextmanager
async def _clients(job: Job, users: int) -> AsyncIterator[list[Session]]:
    """Within the block so many clients are connected, each with connections of its own."""
    gate = asyncio.Semaphore(_CONNECTING)

    async def one(number: int) -> Session:
        key = job.keys[number % len(job.keys)] if job.keys else None
        async with gate:
            # Values are never made arrays of, so torch is not needed.
            return await connect(job.url, model=job.model, api_key=key, tensors="numpy")

    async with AsyncExitStack() as stack:
        try:
            first = await one(0)
            stack.push_async_callback(first.close)
            others = await asyncio.gather(*map(one, range(1, users)))
        except AuthError as error:
            raise LoadError(
                f"{error.message}: put keys into a file, one a line, and give it as --api-keys FILE"
                " (or one key as the environment variable NDIF_API_KEY)"
            ) from None
        except ConnectError as error:
            raise LoadError(f"{_line(error)}: is a server running there?") from None
        except NdifError as error:
            raise LoadError(_line(error)) from None
        for session in others:
            stack.push_async_callback(session.close)
        yield [first, *others]


class _Version(msgspec.Struct):
    version: str


async def _facts(session: Session) -> ServerFacts:
    timeout = aiohttp.ClientTimeout(total=_VERSION_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as http,
            http.get(f"{session.url}/version") as reply,
        ):
            version = msgspec.json.decode(await reply.read(), type=_Version).version
    except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError):
        version = "unknown"
    tree = session.tree
    return ServerFacts(
        url=session.url,
        version=version,
        model=tree.id,
        kind=tree.kind,
        dtype=tree.dtype,
        device=tree.device,
        tensor_parallel=tree.tensor_parallel,
        packed=tree.packed,
        layers=tree.num_layers,
        hidden_size=tree.hidden_size,
        vocabulary=tree.vocab_size,
    )


def _sizes(session: Session, settings: Settings) -> Sizes:
    return Sizes(
        layers=session.tree.num_layers,
        vocabulary=session.tree.vocab_size,
        prompt_tokens=settings.prompt_tokens,
        new_tokens=settings.new_tokens,
    )


def _examples(settings: Settings, sizes: Sizes, planned: Sequence[Planned]) -> list[Request]:
    """Return one request of each scenario that will be sent."""
    recorded = {one.request.scenario: one.request for one in reversed(planned)}
    names = [name for name, weight in settings.weights.items() if weight]
    rng = Random(f"{settings.seed} rehearsal")
    drawn = {name: scenarios.draw({name: 1.0}, rng, sizes) for name in names}
    return list((recorded | drawn).values())


async def _rehearse(session: Session, examples: Sequence[Request]) -> None:
    """Send each once: what this server refuses is better known before the test than after it."""
    ignore: Callable[[object], None] = lambda _: None  # noqa: E731
    for request in examples:
        try:
            await scenarios.write(session, request, ignore)
        except NdifError as error:
            raise LoadError(f"the server refuses {request.scenario}: {_line(error)}") from None


def _line(error: NdifError) -> str:
    return error.message.partition("\n")[0]
