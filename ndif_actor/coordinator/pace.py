"""How fast requests are served, to tell refused clients when to come back."""

from __future__ import annotations

#: Bounds of the advice, in seconds.
MIN_WAIT_S, MAX_WAIT_S = 1.0, 60.0

#: Weight of the newest forward in the running mean.
_WEIGHT = 0.2


class Pace:
    """A running mean of the seconds that one request takes of the replica."""

    def __init__(self) -> None:
        self._request_s: float | None = None

    def note(self, groups: int, pass_s: float) -> None:
        """Take in one forward that carried `groups` requests and took `pass_s` seconds."""
        newest = pass_s / groups
        if self._request_s is None:
            self._request_s = newest
        self._request_s += _WEIGHT * (newest - self._request_s)

    def wait_s(self, queued: int) -> float:
        """Return after how many seconds half of `queued` requests will have gone."""
        expected = queued / 2 * (self._request_s or 0.0)
        return min(max(expected, MIN_WAIT_S), MAX_WAIT_S)
