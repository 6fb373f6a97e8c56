"""One request of a load test: sent by a real client, timed, and noted whatever becomes of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from bench.load import scenarios
from bench.load.scenarios import Request
from ndif_client.errors import BusyError, NdifError
from ndif_client.progress import Progress
from ndif_client.results import Result
from ndif_client.session import Session

#: Characters of an error's first line that are kept.
_ERROR_CHARACTERS = 200

#: How a request can end besides well, or with a fault of the server (whose kind is the status).
OK, REFUSED, TIMEOUT, UNFINISHED = "ok", "refused", "timeout", "unfinished"

#: In these nobody knows how long it would have taken: longer than until it was given up.
GIVEN_UP = (TIMEOUT, UNFINISHED)


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request as its user saw it. Times are in seconds, points in time from the level's start.

    Attributes:
        intended_s: when it was to be sent; waiting counts from here.
        sent_s: when the harness got to it.
        done_s: when all bytes of its result were here, or it was given up.
        status: "ok", "refused" (the queue was full), "timeout", "unfinished" (cancelled after the
            drain), or the kind of the server's fault.
        error: first line of what was said then.
        retry_after_s: when to come back, where it was refused.
        queue_s, run_s: until its forward began, and that forward, as the server measured them; of
            a generation, all its forwards.
        transfer_s: from the end of the forward (of a generation: the last token) until `done_s`.
        started_s: when the server said that its forward begins.
        first_token_s: from arrival there to the first token.
        bytes: of the saved values, as they came.
        tokens: of its prompts.
        forward, groups, rows: number of its (first) forward, requests in it, tokens in it.
        forwards: how many it took.
    """

    scenario: str
    user: int
    intended_s: float
    sent_s: float
    done_s: float
    status: str = OK
    error: str = ""
    retry_after_s: float | None = None
    queue_s: float | None = None
    run_s: float | None = None
    transfer_s: float | None = None
    started_s: float | None = None
    first_token_s: float | None = None
    bytes: int = 0
    tokens: int = 0
    forward: int = 0
    groups: int = 0
    rows: int = 0
    forwards: int = 0

    @property
    def latency_s(self) -> float:
        """Seconds from the intended time on, so that a harness that is late hides nothing."""
        return self.done_s - self.intended_s


class Planned(msgspec.Struct, frozen=True):
    """A request, who sends it, and when: seconds from the level's start."""

    at_s: float
    user: int
    request: Request


class Log:
    """What has been sent since the level's start, and what became of it."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.rows: list[Row] = []
        self.sent: list[Planned] = []

    def now(self) -> float:
        """Return the seconds since the level's start."""
        return time.perf_counter() - self._began

    @property
    def in_flight(self) -> int:
        """Requests sent that have not ended."""
        return len(self.sent) - len(self.rows)


class _Progress:
    """When the server said what of one request."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.started_s: float | None = None
        self.last_token_s: float | None = None

    def note(self, progress: Progress) -> None:
        if progress.state == "running" and self.started_s is None:
            self.started_s = self._now()
        elif progress.state == "generating":
            self.last_token_s = self._now()


async def ask(session: Session, planned: Planned, log: Log, timeout_s: float) -> Row:
    """Send a request, wait for its result, and add what was seen to the log.

    Args:
        session: its user's.
        planned: what to send; its time has come.
        log: to add to.
        timeout_s: after which it is cancelled.

    Returns:
        What was added. A request that is cancelled from outside adds its row, too.
    """
    log.sent.append(planned)
    sent_s, progress, status, message = log.now(), _Progress(log.now), OK, ""
    result: Result | None = None
    retry_after_s: float | None = None
    try:
        async with asyncio.timeout(timeout_s):
            result = await scenarios.write(session, planned.request, progress.note)
    except TimeoutError:
        status = TIMEOUT
    except NdifError as error:
        status, message = _status(error), str(error)
        retry_after_s = error.retry_after if isinstance(error, BusyError) else None
    except OSError as error:
        status, message = "connect", str(error)
    except asyncio.CancelledError:
        log.rows.append(_failed(planned, sent_s, log.now(), UNFINISHED))
        raise
    done_s = log.now()
    if result is None:
        row = _failed(planned, sent_s, done_s, status, message, retry_after_s)
    else:
        row = _answered(planned, sent_s, done_s, progress, result)
    log.rows.append(row)
    return row


def _answered(
    planned: Planned, sent_s: float, done_s: float, progress: _Progress, result: Result
) -> Row:
    seen = result.statistics
    ended_s = progress.last_token_s
    if ended_s is None and progress.started_s is not None:
        ended_s = progress.started_s + seen.forward_s
    return Row(
        scenario=planned.request.scenario,
        user=planned.user,
        intended_s=planned.at_s,
        sent_s=sent_s,
        done_s=done_s,
        queue_s=seen.queue_s,
        run_s=seen.forward_s,
        transfer_s=None if ended_s is None else max(0.0, done_s - ended_s),
        started_s=progress.started_s,
        first_token_s=seen.first_token_s,
        bytes=_bytes(result),
        tokens=sum(len(prompt.ids) for invoke in result.prompts for prompt in invoke),
        forward=seen.forward,
        groups=seen.groups,
        rows=seen.tokens,
        forwards=seen.forwards,
    )


def _failed(
    planned: Planned,
    sent_s: float,
    done_s: float,
    status: str,
    message: str = "",
    retry_after_s: float | None = None,
) -> Row:
    return Row(
        scenario=planned.request.scenario,
        user=planned.user,
        intended_s=planned.at_s,
        sent_s=sent_s,
        done_s=done_s,
        status=status,
        error=message.partition("\n")[0][:_ERROR_CHARACTERS],
        retry_after_s=retry_after_s,
    )


def _status(error: NdifError) -> str:
    if isinstance(error, BusyError):
        return REFUSED
    if error.fault is not None:
        return error.fault.kind
    return type(error).__name__.removesuffix("Error").lower()


def _bytes(result: Result) -> int:
    # Making arrays of the values would cost the harness time that is not the server's, and numpy
    # widens bfloat16, so the buffers are counted as they came.
    return sum(buffer.nbytes for buffer in result._buffers)
