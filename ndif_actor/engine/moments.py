"""The firings of a forward: which module's input or output, and what was seen there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import torch

from ndif_actor.engine import leaves
from ndif_actor.engine.internals import listening
from ndif_client.wire.graph import AttentionPort, Port


class Moment(msgspec.Struct, frozen=True):
    """One firing in a forward: of a module's input or output, or inside of an attention."""

    path: str
    port: Port
    call: int


#: What a run showed: every tensor that entered or left a module, by moment and leaf.
Recording = dict[Moment, dict[str, torch.Tensor]]


@contextmanager
def recording_moments(model: torch.nn.Module, into: Recording) -> Iterator[None]:
    """Within the block, note in `into` every tensor that enters or leaves a module, in order."""
    calls: Counter[tuple[str, Port]] = Counter()

    def note(path: str, port: Port, structure: Any) -> None:
        moment = Moment(path, port, calls[path, port])
        calls[path, port] += 1
        into[moment] = dict(leaves.walk(structure))

    with ExitStack() as stack:
        for path, module in model.named_modules():
            stack.enter_context(_hooked(path, module, note))
        paths = {module: path for path, module in model.named_modules()}
        stack.enter_context(listening(_Witness(paths, note)))
        yield


class _Witness:
    """Notes what passes inside of attentions; in a packed row no scores or patterns are formed."""

    def __init__(
        self,
        paths: Mapping[torch.nn.Module, str],
        note: Callable[[str, Port, Any], None],
    ) -> None:
        self._paths = paths
        self._note = note

    def wants(self, module: torch.nn.Module, port: AttentionPort) -> bool:
        return True

    def explicit(self, module: torch.nn.Module) -> Sequence[tuple[int, int]]:
        return ()

    def fire(self, module: torch.nn.Module, port: AttentionPort, value: Any) -> Any:
        self._note(self._paths[module], port, value)
        return value


@contextmanager
def _hooked(
    path: str, module: torch.nn.Module, note: Callable[[str, Port, Any], None]
) -> Iterator[None]:
    before = module.register_forward_pre_hook(
        lambda _, args, kwargs: note(path, "input", leaves.inputs(args, kwargs)), with_kwargs=True
    )
    after = module.register_forward_hook(lambda _, args, output: note(path, "output", output))
    try:
        yield
    finally:
        before.remove()
        after.remove()
