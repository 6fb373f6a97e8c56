"""Forwards compiled anew: what their operations are called, seen and replaced by, and no more."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ndif_actor.engine import leaves, operations
from ndif_actor.engine.operations import Rewritten, Unoffered, find, watching

SCALE = 3.0


def double(value: torch.Tensor, *, times: int = 1) -> torch.Tensor:
    return value * 2**times


def names(function: Callable[..., Any]) -> list[str]:
    return [operation.name for operation in Rewritten(function).operations]  # type: ignore[arg-type]


class Watcher:
    """Notes what it is told, and replaces what it was given a replacement for."""

    def __init__(self, **replacements: Any) -> None:
        self.seen: list[tuple[str, str, dict[str, Any]]] = []
        self.replacements = replacements

    def __call__(self, name: str, port: Any, structure: Any) -> Any:
        self.seen.append((name, port, dict(leaves.walk(structure))))
        replacement = self.replacements.get(f"{name}_{port}")
        return None if replacement is None else replacement(structure)


def test_operations_are_named_after_what_is_called_and_counted_as_they_run() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.attn.q_proj(x).view(1, -1).transpose(0, 1)
        y = double(double(y) + x) - torch.nn.functional.silu(x) @ x.transpose(0, 1)
        return self.layers[0](y)  # type: ignore[no-any-return]

    assert names(forward) == [
        "self_attn_q_proj_0", "view_0", "transpose_0", "double_0", "add_0", "double_1", "silu_0",
        "transpose_1", "matmul_0", "sub_0", "self_layers_0",
    ]  # fmt: skip


def test_builtins_and_changes_in_place_are_no_operations() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, torch.Tensor) and len(x.shape) > 1:
            x.add_(1)
            x += 1
            torch.add(x, 1, out=x)
        later = lambda: double(x)  # noqa: E731
        return later()

    assert names(forward) == ["later_0"]


def test_an_operation_knows_its_line() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = x.cos()
        return (
            y
            .sin()
            .tanh()
        )  # fmt: skip

    rewritten = Rewritten(forward)  # type: ignore[arg-type]
    lines = rewritten.source.splitlines()
    found = {operation.name: lines[operation.line].strip() for operation in rewritten.operations}
    assert found == {"cos_0": "y = x.cos()", "sin_0": ".sin()", "tanh_0": ".tanh()"}


def run(function: Any, watcher: Watcher, *args: Any, only: Any = None) -> Any:
    return Rewritten(function).watched(watcher, only)(*args)


def test_a_rewritten_function_gives_what_the_original_gives() -> None:
    def forward(
        x: torch.Tensor, /, offset: float = 1.5, *rest: float, factor: float = 2.0, **more: Any
    ) -> Any:
        found = [double(x, times=n) for n in range(2) if n or rest]
        total = sum(found) if found else x
        return total * factor + offset**2 - SCALE, f"{offset + 1:.1f}", rest, more

    x = torch.tensor([1.0, 2.0])
    quiet = Rewritten(forward).watched(lambda *seen: None)  # type: ignore[arg-type]

    for args, kwargs in (((x,), {}), ((x, 2, 3, 4), {"factor": 5, "other": 1})):
        wanted, got = forward(*args, **kwargs), quiet(*args, **kwargs)
        assert torch.equal(got[0], wanted[0])
        assert got[1:] == wanted[1:]


def test_inputs_and_outputs_are_seen_and_replaced() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        y = double(x, times=2)
        return y.sub(1) * y

    def times_one(structure: Any) -> Any:
        return {**structure, "kwargs": {"times": 1}}

    def half(structure: Any) -> Any:
        return leaves.replace(structure, "args.0", structure["args"][0] / 2)

    watcher = Watcher(double_0_input=times_one, sub_0_input=half, mul_0_output=lambda y: y + 100)

    assert run(forward, watcher, torch.tensor(3.0)).item() == (6 / 2 - 1) * 6 + 100
    seen = [(name, port, {k: v.item() for k, v in found.items()}) for name, port, found in
            watcher.seen]  # fmt: skip
    assert seen == [
        ("double_0", "input", {"args.0": 3.0}),
        ("double_0", "output", {"": 6.0}),
        ("sub_0", "input", {"args.0": 6.0}),
        ("sub_0", "output", {"": 2.0}),
        ("mul_0", "input", {"args.0": 2.0, "args.1": 6.0}),
        ("mul_0", "output", {"": 12.0}),
    ]


def test_only_the_operations_asked_for_are_told_of() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = double(x) + 1
        return x

    watcher = Watcher()

    assert run(forward, watcher, torch.tensor(0.0), only={"add_0"}).item() == 7
    assert [name for name, port, _ in watcher.seen if port == "output"] == ["add_0"] * 3


def test_a_failing_operation_fails_as_in_the_original() -> None:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.view(7)

    with pytest.raises(RuntimeError, match="invalid for input of size 2") as caught:
        run(forward, Watcher(), torch.zeros(2))

    assert "return x.view(7)" in str(caught.getrepr())


# ---------------------------------------------------------------- what can't be rewritten


def test_what_depends_on_its_place_is_not_rewritten() -> None:
    def generator(x: Any) -> Any:
        yield x

    def frame(x: Any) -> Any:
        return locals()

    def private(self: Any) -> Any:
        return self.__secret

    without_source = eval("lambda x: x + 1")
    for function, why in (
        (generator, "generator"),
        (frame, r"locals\(\)"),
        (private, "private name"),
        (without_source, "source"),
    ):
        with pytest.raises(Unoffered, match=why):
            Rewritten(function)


def test_a_class_of_another_library_is_not_looked_into() -> None:
    with pytest.raises(Unoffered, match="forward of Linear is not code of transformers"):
        find(torch.nn.Linear(2, 2))


# ---------------------------------------------------------------- modules


def logged(function: Any) -> Any:
    """A decorator as transformers has them."""

    @functools.wraps(function)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.log.append("in")
        return function(self, *args, **kwargs)

    return wrapper


class Scaled(torch.nn.Linear):
    """Its forward is decorated, and calls that of its base."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.log: list[str] = []

    @logged
    @torch.no_grad()
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * SCALE


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Scaled:
    monkeypatch.setattr(operations, "_LIBRARY", __name__.partition(".")[0])
    return Scaled()


def test_decorators_closures_and_super_stay_as_they_are(module: Scaled) -> None:
    x, watcher = torch.ones(1, 2), Watcher(mul_0_output=lambda y: y + 1)
    wanted = module(x) + 1

    with watching(module, watcher):
        got = module(x)

    assert torch.equal(got, wanted)
    assert not got.requires_grad
    assert module.log == ["in", "in"]
    assert [name for name, port, _ in watcher.seen if port == "input"] == ["forward_0", "mul_0"]


def test_only_the_module_itself_is_watched_and_only_within_the_block(module: Scaled) -> None:
    other, watcher = Scaled(), Watcher()

    with pytest.raises(ZeroDivisionError), watching(module, watcher):
        other(torch.ones(1, 2))
        raise ZeroDivisionError

    module(torch.ones(1, 2))
    assert watcher.seen == []
    assert "forward" not in module.__dict__


def test_a_wrapper_around_the_forward_of_an_instance_stays_around_it(module: Scaled) -> None:
    original = module.forward

    def shifted(input: torch.Tensor) -> Any:
        return original(input) + 1000

    module.forward = shifted  # type: ignore[method-assign]
    x, watcher = torch.ones(1, 2), Watcher()
    wanted = module(x)

    with watching(module, watcher):
        assert torch.equal(module(x), wanted)

    assert module.forward is shifted
    assert [name for name, _, _ in watcher.seen][::2] == ["forward_0", "mul_0"]


def test_a_module_that_something_else_runs_offers_no_operations(module: Scaled) -> None:
    module.forward = lambda input: input  # type: ignore[method-assign]

    with pytest.raises(Unoffered, match="something else runs it"):
        find(module)
