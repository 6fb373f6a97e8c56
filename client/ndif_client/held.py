"""Values that stay on the server between the traces of a session, and what stands for them here.

with session.trace(prompt) as trace:
    direction = model.model.layers[3].output.mean(1).keep("direction")   # a Handle
with session.trace(other) as trace:
    model.model.layers[3].output += direction
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from ndif_client.errors import ClosedTraceError, NdifError, graph_error
from ndif_client.operators import is_in_place, operator_names
from ndif_client.proxy import Proxy
from ndif_client.recorder import Origin, Recorder, current_recorder
from ndif_client.transport import Transport, quoted
from ndif_client.values import Delegate, node_of
from ndif_client.wire.graph import MAX_HELD_NAME
from ndif_client.wire.messages import DropRequest, HeldSpec, HeldValues
from ndif_client.wire.tensors import TensorSpec

#: Names of which it is looked up, now and then, whether who keeps them is still on its way.
_MANY_KEEPERS = 4096


class Holder:
    """What one session holds on the server, as far as it is known here.

    Attributes:
        id: of the session, made at random; the server knows its values by it.
        has_kept: whether anything may be held there.
    """

    def __init__(self, transport: Transport) -> None:
        self.id = uuid.uuid4().hex
        self.has_kept = False
        self._transport = transport
        #: what was uploaded, by the digest of its content, and the other way round
        self._uploads: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        #: the request that was sent last of those that keep something as a name
        self._keepers: dict[str, Origin] = {}
        #: what was uploaded is, by name
        self._specs: dict[str, HeldSpec] = {}
        self._handles: WeakValueDictionary[str, Handle] = WeakValueDictionary()
        #: names of which no handle is left, nor anything else that could know them
        self._abandoned: list[str] = []

    def handle(self, name: str) -> Handle:
        """Return a handle for a value that was given its name by the user.

        Raises:
            GraphError: that can't be a name.
        """
        known = self._handles.get(check_name(name))
        return Handle(self, name) if known is None else known

    def keep(self, value: Proxy, name: str | None) -> Handle:
        """Record that a value is to be kept; return what stands for it in later traces.

        Raises:
            GraphError: it is a generation's, or the name is taken or can't be one.
        """
        recorder = value._recorder
        own = name is None
        name = uuid.uuid4().hex if name is None else check_name(name)
        recorder.keep(node_of(value), name)
        self.has_kept = True
        self.forget_upload(name)
        handle = Handle(self, name, recorder, value._fields, own=own)
        recorder.kept[name] = handle
        if own:
            self._handles[name] = handle
        return handle

    # ------------------------------------------------------------ uploads

    def uploaded(self, digest: str) -> str | None:
        """Return the name of what was uploaded with that content, if that may still be held."""
        return self._uploads.get(digest)

    def note_upload(self, digest: str, name: str, spec: HeldSpec) -> None:
        """Remember what content a name has."""
        self._uploads[digest], self._digests[name], self._specs[name] = name, digest, spec

    def spec(self, name: str) -> HeldSpec | None:
        """Return what a held value is, if that is known here."""
        return self._specs.get(name)

    def note_keeper(self, names: Iterable[str], origin: Origin) -> None:
        """Remember that a request is on its way that keeps something as each of these names."""
        if len(self._keepers) > _MANY_KEEPERS:
            self._keepers = {n: o for n, o in self._keepers.items() if not o.is_over}
        for name in names:
            self._keepers[name] = origin

    def keepers_of(self, names: Iterable[str]) -> list[str]:
        """Return the requests under way that keep something as one of these names."""
        found = []
        for name in names:
            origin = self._keepers.get(name)
            if origin is None:
                continue
            if origin.is_over:
                del self._keepers[name]
            else:
                found.append(origin.request)
        return found

    def forget_upload(self, name: str) -> None:
        """Note that a name has other content from now on, or none."""
        digest = self._digests.pop(name, None)
        self._specs.pop(name, None)
        if digest is not None and self._uploads.get(digest) == name:
            del self._uploads[digest]

    # ------------------------------------------------------------ on the server

    async def values(self) -> HeldValues:
        """Return what the server holds for this session."""
        return await self._transport.get(f"/v1/sessions/{quoted(self.id)}", HeldValues)

    async def drop(self, names: Iterable[str]) -> HeldValues:
        """Have the server let go of values; return those that it held."""
        wanted = list(names)
        for name in wanted:
            self.forget_upload(name)
        path = f"/v1/sessions/{quoted(self.id)}/drop"
        return await self._transport.post(path, DropRequest(wanted), HeldValues)

    async def drop_all(self) -> None:
        """Have the server let go of everything; whether it does is not told."""
        with suppress(NdifError):
            await self._transport.delete(f"/v1/sessions/{quoted(self.id)}")

    def abandon(self, name: str) -> None:
        """Note that nobody can use a value any more."""
        self.forget_upload(name)
        self._abandoned.append(name)

    @property
    def has_abandoned(self) -> bool:
        """Whether there is something for `drop_abandoned` to do."""
        return bool(self._abandoned)

    async def drop_abandoned(self) -> None:
        """Have the server let go of what nobody can use any more; whether it does is not told."""
        names, self._abandoned = self._abandoned, []
        with suppress(NdifError):
            await self.drop(names)


class Handle(Delegate):
    """Stands for a value that the server holds, in every trace of its session.

    In a trace it is used as any other value. It is never changed in place: a new value is kept,
    under the same name if it is to take the place of this one. A value that was kept without a name
    is let go of when its handle is; others stay until `session.drop` or the end of the session.
    """

    def __init__(
        self,
        holder: Holder,
        name: str,
        keeper: Recorder | None = None,
        fields: tuple[str, ...] | None = None,
        *,
        own: bool = False,
    ) -> None:
        self._holder = holder
        self._name = name
        self._origin = None if keeper is None else keeper.origin
        self._fields = fields
        self._own = own

    @property
    def name(self) -> str:
        """What the server knows it by."""
        return self._name

    @property
    def grad(self) -> Proxy:
        """The gradient of what was held before this trace, in the last backward."""
        return self._before().grad

    @grad.setter
    def grad(self, gradient: Any) -> None:
        self._before().grad = gradient

    def _before(self) -> Proxy:
        recorder = self._recorder()
        return Proxy(recorder, recorder.held(self, before=0), None, self._fields)

    def _sole_value(self, otherwise: Proxy | None = None) -> Proxy:
        recorder = self._recorder()
        begin = None if otherwise is None else node_of(otherwise)
        return Proxy(recorder, recorder.held(self, begin), None, self._fields)

    def _recorder(self) -> Recorder:
        recorder = current_recorder(f"the held value {self._shown()}")
        if recorder.holder is not self._holder:
            raise graph_error(
                f"{self._shown()} is held for another session; fetch it there, and upload it here",
                ClosedTraceError,
            )
        return recorder

    def _shown(self) -> str:
        return "without a name" if self._own else repr(self._name)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name.endswith("_"):
            raise self._unchangeable()
        return getattr(self._sole_value(), name)

    @property
    def shape(self) -> Any:
        """Its shape: as it was uploaded, or in a trace."""
        spec = self._holder.spec(self._name)
        if not isinstance(spec, TensorSpec):
            return self._sole_value().shape
        torch = sys.modules.get("torch")
        return tuple(spec.shape) if torch is None else torch.Size(spec.shape)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name == "grad":
            object.__setattr__(self, name, value)
        else:
            raise graph_error(f"the held value {self._shown()} has no {name!r} to be set")

    def __getitem__(self, index: Any) -> Proxy:
        return self._sole_value()[index]

    def __iter__(self) -> Iterator[Proxy]:
        return iter(self._sole_value())

    def __len__(self) -> int:
        return len(self._sole_value())

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self._unchangeable()

    def _unchangeable(self) -> Exception:
        return graph_error(
            f"the held value {self._shown()} can't be changed in place; change a .clone() of it, "
            "and keep that"
        )

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"Handle({self._name!r})"

    def __del__(self) -> None:
        if self.__dict__.get("_own"):
            self._holder.abandon(self._name)


def check_name(name: Any) -> str:
    """Return a name for a held value, if it can be one.

    Raises:
        GraphError: it can't.
    """
    if not isinstance(name, str) or not 0 < len(name) <= MAX_HELD_NAME:
        raise graph_error(f"a held value's name has 1 to {MAX_HELD_NAME} characters: {name!r:.80}")
    return name


def name_of(handle: Handle | str) -> str:
    """Return the name of a held value."""
    return handle.name if isinstance(handle, Handle) else check_name(handle)


def earlier_requests(recorder: Recorder) -> list[str]:
    """Return the requests under way that a trace must come after.

    They keep what its handles stand for, or something else under a name that it uses or keeps: it
    was written after them, and finds what they leave.

    Raises:
        GraphError: what a handle stands for was not sent, or will never be there.
    """
    found: dict[str, None] = {}
    if recorder.holder is not None:
        found = dict.fromkeys(recorder.holder.keepers_of((*recorder.used, *recorder.kept)))
    for handle in recorder.used.values():
        origin: Origin | None = handle._origin
        if origin is None or origin.has_ended:
            continue
        if origin.failure is not None:
            raise graph_error(
                f"the held value {handle._shown()} does not exist, because the trace that was to "
                f"keep it has failed: {origin.failure}"
            ) from origin.failure
        if not origin.was_submitted:
            raise graph_error(
                f"the held value {handle._shown()} does not exist yet: the trace that keeps it has "
                "not run. Await that first, or put both into `async with session.chain()`"
            )
        found[origin.request] = None
    return list(found)


def _forward(name: str) -> Any:
    def method(self: Handle, *args: Any) -> Any:
        if name in _IN_PLACE:
            raise self._unchangeable()
        return getattr(self._sole_value(), name)(*args)

    method.__name__ = name
    return method


_IN_PLACE = frozenset(name for name in operator_names() if is_in_place(name))

for _name in operator_names():
    setattr(Handle, _name, _forward(_name))
for _name in ("__torch_function__", "__array_ufunc__", "__array_function__"):
    setattr(Handle, _name, vars(Proxy)[_name])
