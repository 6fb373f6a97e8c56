"""A module's inputs or outputs where they are several tensors, or one inside of a structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ndif_client.arguments import encode_content
from ndif_client.errors import UnknownNameError, graph_error
from ndif_client.operators import operator_names
from ndif_client.proxy import Proxy
from ndif_client.recorder import Recorder, current_recorder, recorded_place
from ndif_client.sources import capture
from ndif_client.values import SAME, Delegate, Hooked, Value, View, hooked_at, node_of
from ndif_client.wire.graph import Apply, HookPoint
from ndif_client.wire.messages import HookInfo

if TYPE_CHECKING:
    from ndif_client.held import Handle


def read_hook(path: str, info: HookInfo) -> Proxy:
    """Record a read of a hook point."""
    hook = HookPoint(path, info.port, info.leaf, info.call, info.operation)
    recorder = current_recorder(str(hook))
    invoke = recorder.here(str(hook))
    place = hook, invoke, recorder.block.steps
    known = recorder.seen.get(place)
    if known is not None and _is_still(known, recorder, invoke):
        recorder.check_read(hook)
        # As in torch, it is the same tensor: who changes one sees it in the other.
        return Proxy(recorder, known._node, View(known, Apply(SAME), known._version))
    number = recorder.read(hook, info)
    found = Proxy(recorder, number, Hooked(hook, info, invoke, recorder.last_write(hook, invoke)))
    recorder.seen[place] = found
    return found


def _is_still(known: Value, recorder: Recorder, invoke: int) -> bool:
    """Whether what was read at a hook point is what a read would give now."""
    place = known._origin
    if not isinstance(place, Hooked) or known._stale is not None:
        return False
    written = recorder.last_write(place.hook, invoke)
    return written == place.last_write and recorder.is_made(known._node)


def write_hook(path: str, info: HookInfo, value: Any) -> None:
    """Record a write of a hook point."""
    hook = HookPoint(path, info.port, info.leaf, info.call, info.operation)
    recorder = current_recorder(str(hook))
    invoke = recorder.here(str(hook))
    if isinstance(value, Delegate):
        value = value._sole_value()
    if isinstance(value, Value):
        if recorder.was_just_written(hook, invoke, node_of(value, recorder)):
            return  # `module.output += v` has written it already
        if hooked_at(value) != hook:
            value._given = value._given or capture()
    recorder.write(hook, info, encode_content(value, recorder), invoke)


class HookTuple(Delegate):
    """Several hook points, found as the module's own structure has them: `[0]`, `.logits`.

    Where there is only one, it can be used as if it were the tensor itself.
    """

    def __init__(self, path: str, infos: Sequence[HookInfo], prefix: str = "") -> None:
        self._path = path
        self._infos = list(infos)
        self._prefix = prefix
        #: what was found at each step of an address, read anew for other steps of a generation
        self._read: dict[tuple[str, Any], Proxy | HookTuple] = {}

    # ------------------------------------------------------------ parts

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, int | str) or isinstance(key, bool):
            return self._sole_value()[key]
        step = self._step(key)
        found = (step, recorded_place())
        if found not in self._read:
            infos = self._below(step)
            address = self._address(step)
            if len(infos) == 1 and infos[0].leaf == address:
                self._read[found] = read_hook(self._path, infos[0])
            else:
                self._read[found] = HookTuple(self._path, infos, address)
        return self._read[found]

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, int | str) or isinstance(key, bool):
            self._sole_value()[key] = value
            return
        step = self._step(key)
        infos = self._below(step)
        if len(infos) != 1:
            raise graph_error(f"{self._place(step)} has several tensors: {self._offered()}")
        write_hook(self._path, infos[0], value)
        self._read.pop((step, recorded_place()), None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._steps():
            return self[name]
        if len(self._infos) == 1:
            return getattr(self._sole_value(), name)
        raise graph_error(
            f"{self._place()} has no {name!r}; it has {self._offered()}", UnknownNameError
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        elif name == "grad" and name not in self._steps():
            self._sole_value().grad = value
        else:
            self[name] = value

    def __iter__(self) -> Iterator[Any]:
        return (self[step] for step in self._steps())

    def __len__(self) -> int:
        return len(self._steps())

    def __dir__(self) -> list[str]:
        fields = [step for step in self._steps() if step.isidentifier()]
        return [*super().__dir__(), *fields]

    def __repr__(self) -> str:
        lines = [
            f"  {info.leaf}: {info.dtype}[{', '.join(map(str, info.shape))}]"
            for info in self._infos
        ]
        return "\n".join([f"{self._place()}:", *lines])

    # ------------------------------------------------------------ as one value

    def save(self, name: str | None = None) -> Proxy:
        """Save the one tensor there is; of several, save each by itself."""
        return self._sole_value().save(name)

    def keep(self, name: str | None = None) -> Handle:
        """Keep the one tensor there is; of several, keep each by itself."""
        return self._sole_value().keep(name)

    def _sole_value(self) -> Proxy:
        if len(self._infos) != 1:
            raise graph_error(
                f"{self._place()} has several tensors, take one of them: {self._offered()}"
            )
        found: Any = self
        while isinstance(found, HookTuple):
            found = found[found._steps()[0]]
        assert isinstance(found, Proxy)
        return found

    # ------------------------------------------------------------ addresses

    def _steps(self) -> list[str]:
        """Return the next steps of all addresses below this one, in order."""
        start = len(self._prefix) + 1 if self._prefix else 0
        return list(dict.fromkeys(i.leaf[start:].partition(".")[0] for i in self._infos))

    def _step(self, key: int | str) -> str:
        steps = self._steps()
        name = str(key)
        if isinstance(key, int) and self._infos[0].port == "input" and not self._prefix:
            name = {0: "args", 1: "kwargs"}.get(key, name)
        elif isinstance(key, int) and not any(map(str.isdigit, steps)):
            # As in transformers' outputs, fields also have positions.
            name = steps[key] if -len(steps) <= key < len(steps) else name
        if name not in steps:
            raise graph_error(
                f"{self._place()} has no tensor at {key!r}; it has {self._offered()}",
                UnknownNameError,
            )
        return name

    def _address(self, step: str) -> str:
        return f"{self._prefix}.{step}" if self._prefix else step

    def _below(self, step: str) -> list[HookInfo]:
        address = self._address(step)
        return [
            info
            for info in self._infos
            if info.leaf == address or info.leaf.startswith(f"{address}.")
        ]

    def _place(self, step: str = "") -> str:
        port = "inputs" if self._infos[0].port == "input" else "output"
        address = self._address(step) if step else self._prefix
        operation = self._infos[0].operation
        place = f"{self._path}.source.{operation}" if operation else self._path
        return f"{place}.{port}".lstrip(".") + (f"[{address}]" if address else "")

    def _offered(self) -> str:
        return ", ".join(f"[{step}]" if step.isdigit() else f".{step}" for step in self._steps())


def _forward(name: str) -> Any:
    def method(self: HookTuple, *args: Any) -> Any:
        return getattr(self._sole_value(), name)(*args)

    method.__name__ = name
    return method


for _name in operator_names():
    setattr(HookTuple, _name, _forward(_name))
for _name in ("__torch_function__", "__array_ufunc__", "__array_function__"):
    setattr(HookTuple, _name, vars(Proxy)[_name])
