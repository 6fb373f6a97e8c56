"""How fast requests are served: what to advise refused clients, and how long to linger."""

from __future__ import annotations

#: Bounds of the advice, in seconds.
MIN_WAIT_S, MAX_WAIT_S = 1.0, 60.0

#: The longest that an idle replica waits for requests that are being admitted, in seconds.
MAX_LINGER_S = 0.02

#: Weight of the newest forward in the running means.
_WEIGHT = 0.2


class Pace:
    """Running means of the seconds that a forward takes, and its share for one request."""

    def __init__(self) -> None:
        self._pass_s: float | None = None
        self._request_s = 0.0

    def note(self, groups: int, pass_s: float) -> None:
        """Take in one forward that carried `groups` requests and took `pass_s` seconds."""
        if self._pass_s is None:
            self._pass_s, self._request_s = pass_s, pass_s / groups
        self._pass_s += _WEIGHT * (pass_s - self._pass_s)
        self._request_s += _WEIGHT * (pass_s / groups - self._request_s)

    def wait_s(self, queued: int) -> float:
        """Return after how many seconds half of `queued` requests will have gone."""
        return min(max(queued / 2 * self._request_s, MIN_WAIT_S), MAX_WAIT_S)

    def linger_s(self) -> float:
        """Return how long waiting costs less than making others wait for another forward."""
        return min(self._pass_s or 0.0, MAX_LINGER_S)
