"""The firings of a forward: whose input or output, and what was seen there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import msgspec
import torch

from ndif_actor.engine import leaves
from ndif_actor.engine.internals import listening
from ndif_actor.engine.operations import Unoffered, watching
from ndif_client.wire.graph import AttentionPort, HookPoint, Port


class Moment(msgspec.Struct, frozen=True):
    """One firing in a forward: of a module, inside of an attention, or of an operation."""

    path: str
    port: Port
    call: int
    operation: str = ""

    @classmethod
    def of(cls, point: HookPoint) -> Moment:
        """Return the moment at which a hook point fires."""
        return cls(point.path, point.port, point.call, point.operation)

    def point(self, leaf: str) -> HookPoint:
        """Return the hook point of one tensor at this moment."""
        return HookPoint(self.path, self.port, leaf, self.call, self.operation)


#: What a run showed: every tensor that entered or left a module or operation, by moment and leaf.
Recording = dict[Moment, dict[str, Any]]

#: Makes of a tensor seen at a hook point what is noted; None to leave it out.
Keep = Callable[[HookPoint, torch.Tensor], Any]


@contextmanager
def recording_moments(
    model: torch.nn.Module,
    into: Recording,
    keep: Keep = lambda point, tensor: tensor,
    only: Collection[str] | None = None,
) -> Iterator[None]:
    """Within the block, note in `into` every tensor that enters or leaves, in order.

    Args:
        model: whose modules and operations are watched.
        into: what is seen; a moment's position in it is its order in the forward.
        keep: what is noted of a tensor.
        only: paths of the modules to watch; None for all.
    """
    calls: Counter[tuple[str, Port, str]] = Counter()

    def note(path: str, port: Port, operation: str, structure: Any) -> None:
        moment = Moment(path, port, calls[path, port, operation], operation)
        calls[path, port, operation] += 1
        seen = ((leaf, keep(moment.point(leaf), t)) for leaf, t in leaves.walk(structure))
        into[moment] = {leaf: kept for leaf, kept in seen if kept is not None}

    watched = {
        module: path for path, module in model.named_modules() if only is None or path in only
    }
    with ExitStack() as stack:
        for module, path in watched.items():
            stack.enter_context(_hooked(path, module, note))
        stack.enter_context(listening(_Witness(watched, note)))
        yield


class _Witness:
    """Notes what passes inside of attentions; in a packed row no scores or patterns are formed."""

    def __init__(
        self,
        paths: Mapping[torch.nn.Module, str],
        note: Callable[[str, Port, str, Any], None],
    ) -> None:
        self._paths = paths
        self._note = note

    def wants(self, module: torch.nn.Module, port: AttentionPort) -> bool:
        return module in self._paths

    def explicit(self, module: torch.nn.Module) -> Sequence[tuple[int, int]]:
        return ()

    def fire(self, module: torch.nn.Module, port: AttentionPort, value: Any) -> Any:
        self._note(self._paths[module], port, "", value)
        return value


@contextmanager
def _hooked(
    path: str, module: torch.nn.Module, note: Callable[[str, Port, str, Any], None]
) -> Iterator[None]:
    before = module.register_forward_pre_hook(
        lambda _, args, kwargs: note(path, "input", "", leaves.inputs(args, kwargs)),
        with_kwargs=True,
    )
    after = module.register_forward_hook(lambda _, args, output: note(path, "output", "", output))

    def watch(operation: str, port: Port, structure: Any) -> None:
        note(path, port, operation, structure)

    with ExitStack() as stack:
        stack.callback(before.remove)
        stack.callback(after.remove)
        with suppress(Unoffered):
            stack.enter_context(watching(module, watch))
        yield
