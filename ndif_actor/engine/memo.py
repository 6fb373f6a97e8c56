"""What was found out about a graph, for the next one that is equal.

Sweeps and training loops send the same graph again and again, with other prompts or constants, and
to check one costs tens of microseconds a node. Graphs are equal if their bytes on the wire are, the
lines of the user's program included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

#: Things remembered, and the longest bytes of a graph of which anything is.
_ENTRIES = 128
_MOST_BYTES = 256 << 10

T = TypeVar("T")


class Memo(Generic[T]):
    """Remembers the latest results of one function."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, T] = OrderedDict()
        self._encoder = msgspec.msgpack.Encoder()

    def get(self, arguments: Any, make: Callable[[], T]) -> T:
        """Return what `make` returned for equal arguments, or returns now; errors are not kept.

        Args:
            arguments: all that the result depends on, such that msgspec can encode it.
            make: is given nothing.
        """
        try:
            key = self._encoder.encode(arguments)
        except OverflowError:  # a number that nobody could have sent
            return make()
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
            return found
        made = make()
        if len(key) <= _MOST_BYTES:
            self._known[key] = made
            if len(self._known) > _ENTRIES:
                self._known.popitem(last=False)
        return made

    def clear(self) -> None:
        """Forget everything, because it depends on something else that has changed."""
        self._known.clear()
