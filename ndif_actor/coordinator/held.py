"""What the shards hold for whom: names, shapes and bytes of every session's values. Pure.

    reserve -> commit -> release      a request that uses or keeps values, which ends well
    reserve -> release                one that does not

A request's bytes are reserved before it runs, so keeping can't fail for want of room. Where several
requests keep the same name, the largest of them counts, as they replace each other. Nothing is told
to the shards here: `take_changes` gives what they have to know, in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import msgspec

from ndif_actor.errors import RequestError
from ndif_actor.messages import Dropped, Settle
from ndif_client.wire.messages import Fault, HeldSpec
from ndif_client.wire.tensors import TensorSpec

#: What each value counts at least, for the records of it; this bounds how many there are.
LEAST_BYTES = 4096

#: Names that an error lists.
_SHOWN = 5


class HeldLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much may be held: for one user, for all of them, and how long for an idle session."""

    user_bytes: int
    total_bytes: int
    idle_s: float


class Known(msgspec.Struct, frozen=True):
    """What a session holds now, and what it held before the replica was lost."""

    held: Mapping[str, HeldSpec] = {}
    lost: frozenset[str] = frozenset()


class _Value:
    """One name of a session: what is held as that, and who will keep something else as that."""

    def __init__(self) -> None:
        self.held: HeldSpec | None = None
        self.reserved: dict[str, HeldSpec] = {}

    @property
    def cost(self) -> int:
        """The bytes it takes at most, whoever of those who keep it comes to do so."""
        held = 0 if self.held is None else _cost(self.held)
        return max(held, max(map(_cost, self.reserved.values()), default=0))


class _Session:
    def __init__(self, scope: str, user: str, name: str, now: float) -> None:
        self.scope = scope
        self.user = user
        self.name = name
        self.touched_s = now
        self.values: dict[str, _Value] = {}
        self.held: dict[str, HeldSpec] = {}
        self.lost: set[str] = set()
        self.requests: set[str] = set()
        self.is_dropped = False


class _Reservation(msgspec.Struct, frozen=True):
    session: _Session
    keeps: Mapping[str, HeldSpec]


class HeldRegistry:
    """All sessions that hold something, or whose requests are about to."""

    def __init__(self, limits: HeldLimits) -> None:
        self._limits = limits
        self._sessions: dict[tuple[str, str], _Session] = {}
        self._reservations: dict[str, _Reservation] = {}
        self._bytes: dict[str, int] = {}
        self._scopes = itertools.count()
        self._kept: list[str] = []
        self._dropped: list[Dropped] = []

    def known(self, user: str, session: str, now: float) -> Known:
        """Return what a session holds; that somebody asks keeps it from being idle."""
        found = self._sessions.get((user, session))
        if found is None:
            return Known()
        found.touched_s = now
        return Known(dict(found.held), frozenset(found.lost))

    def held_bytes(self, user: str | None = None) -> int:
        """Return what is held or reserved for a user, or for all."""
        return sum(self._bytes.values()) if user is None else self._bytes.get(user, 0)

    # ------------------------------------------------------------ a request

    def reserve(
        self, request: str, user: str, session: str, keeps: Mapping[str, HeldSpec], now: float
    ) -> str:
        """Make room for what a request keeps; return the scope that its values have.

        Raises:
            RequestError: this would be too much.
        """
        found = self._sessions.get((user, session))
        if found is None:
            found = _Session(str(next(self._scopes)), user, session, now)
        more = 0
        for name, spec in keeps.items():
            value = found.values.get(name)
            more += max(0, _cost(spec) - (0 if value is None else value.cost))
        if more:
            self._check(user, keeps, more)
        self._sessions[user, session] = found
        for name, spec in keeps.items():
            value = found.values.setdefault(name, _Value())
            value.reserved[request] = spec
        self._count(user, more)
        found.touched_s = now
        found.requests.add(request)
        self._reservations[request] = _Reservation(found, keeps)
        return found.scope

    def commit(self, request: str, kept: Iterable[str]) -> None:
        """Note that a request has ended well: what it has kept is held from now on.

        A generation that ends early may have kept less than it has reserved.
        """
        reservation = self._reservations.get(request)
        names = list(kept)
        if reservation is None or not names or reservation.session.is_dropped:
            return
        for name in names:
            self._change(reservation.session, name, held=reservation.keeps[name])
            reservation.session.lost.discard(name)
        self._kept.append(request)

    def release(self, request: str, now: float) -> None:
        """Note that a request has ended, well or not."""
        reservation = self._reservations.pop(request, None)
        if reservation is None:
            return
        session = reservation.session
        session.requests.discard(request)
        session.touched_s = now
        if not session.is_dropped:
            for name in reservation.keeps:
                self._change(session, name, released=request)
            self._forget_if_empty(session)

    # ------------------------------------------------------------ ends

    def drop(
        self, user: str, session: str, names: Iterable[str], now: float
    ) -> dict[str, HeldSpec]:
        """Let go of held values; return those that there were."""
        found = self._sessions.get((user, session))
        if found is None:
            return {}
        found.touched_s = now
        gone: dict[str, HeldSpec] = {}
        for name in names:
            found.lost.discard(name)
            value = found.values.get(name)
            if value is not None and value.held is not None:
                gone[name] = value.held
                self._change(found, name, dropped=True)
        if gone:
            self._dropped.append(Dropped(found.scope, list(gone)))
        self._forget_if_empty(found)
        return gone

    def drop_session(self, user: str, session: str) -> bool:
        """Let go of all that a session holds, and will; False if there is none of it."""
        found = self._sessions.pop((user, session), None)
        if found is None:
            return False
        found.is_dropped = True
        self._count(user, -sum(value.cost for value in found.values.values()))
        self._dropped.append(Dropped(found.scope))
        return True

    def expire(self, now: float) -> None:
        """Drop the sessions that have been idle for too long."""
        for (user, session), found in list(self._sessions.items()):
            if not found.requests and found.touched_s + self._limits.idle_s <= now:
                self.drop_session(user, session)

    def lose_all(self) -> None:
        """Note that the replica is lost, and all that it held."""
        self._kept.clear()
        self._dropped.clear()
        for session in list(self._sessions.values()):
            for name, value in list(session.values.items()):
                if value.held is not None:
                    session.lost.add(name)
                    self._change(session, name, dropped=True)

    def take_changes(self) -> Settle | None:
        """Return what the shards have to know since the last time, or None."""
        if not self._kept and not self._dropped:
            return None
        changes = Settle(self._kept, self._dropped)
        self._kept, self._dropped = [], []
        return changes

    # ------------------------------------------------------------ counts

    def _check(self, user: str, names: Iterable[str], more: int) -> None:
        """Refuse to hold that many more bytes, if they are too many."""
        shown = sorted(names)
        kept = ", ".join(map(repr, shown[:_SHOWN])) + (", ..." if len(shown) > _SHOWN else "")
        mine, limits = self.held_bytes(user) + more, self._limits
        if mine > limits.user_bytes:
            raise _too_much(
                f"keeping {kept} would make {mine} bytes that are held for you; this server allows "
                f"{limits.user_bytes}. Drop what you need no longer: session.drop(...)"
            )
        total = self.held_bytes() + more
        if total > limits.total_bytes:
            raise _too_much(
                f"keeping {kept} would make {total} bytes that are held here for all users; this "
                f"server allows {limits.total_bytes}. Keep less, or try again later"
            )

    def _change(
        self,
        session: _Session,
        name: str,
        *,
        held: HeldSpec | None = None,
        released: str | None = None,
        dropped: bool = False,
    ) -> None:
        value = session.values[name]
        before = value.cost
        if held is not None:
            value.held = session.held[name] = held
        elif dropped:
            value.held = None
            session.held.pop(name, None)
        if released is not None:
            value.reserved.pop(released, None)
        if value.held is None and not value.reserved:
            del session.values[name]
        self._count(session.user, value.cost - before)

    def _count(self, user: str, more: int) -> None:
        total = self._bytes.get(user, 0) + more
        if total:
            self._bytes[user] = total
        else:
            self._bytes.pop(user, None)

    def _forget_if_empty(self, session: _Session) -> None:
        if not session.values and not session.lost and not session.requests:
            del self._sessions[session.user, session.name]


def _too_much(message: str) -> RequestError:
    return RequestError(Fault(kind="limit", message=message))


def _cost(spec: HeldSpec) -> int:
    tensors = [spec] if isinstance(spec, TensorSpec) else spec
    return max(LEAST_BYTES, sum(tensor.nbytes for tensor in tensors))
