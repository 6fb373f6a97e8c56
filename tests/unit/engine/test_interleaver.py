"""Hook points while a forward runs: what is woken when, and what a write changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ndif_actor.engine import leaves
from ndif_actor.engine.hookpoints import HookTable
from ndif_actor.engine.interleaver import Interleaver, LiveMoment
from ndif_actor.engine.moments import Moment, recording_moments
from ndif_actor.engine.program import BEFORE_FORWARD
from tests.requests import point


class Twice(torch.nn.Module):
    """Calls one module twice in a forward, the second time by name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Identity()
        self.last = torch.nn.Identity()
        self.finished = False

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        first = self.inner(value)
        second = self.inner(input=first + 1)
        result: torch.Tensor = self.last(second * 10)
        self.finished = True
        return result


MOMENTS = [
    Moment("", "input", 0),
    Moment("inner", "input", 0),
    Moment("inner", "output", 0),
    Moment("inner", "input", 1),
    Moment("inner", "output", 1),
    Moment("last", "input", 0),
    Moment("last", "output", 0),
    Moment("", "output", 0),
]
TABLE = HookTable(
    {}, {moment: order for order, moment in enumerate(MOMENTS)}, frozenset(), None, None
)


class Program:
    """Stands where an execution does: notes what it sees, and writes if it is told to."""

    def __init__(self, *moments: Moment, write: float | None = None) -> None:
        self.plan = self
        self.orders = [TABLE.moments[moment] for moment in moments]
        self.last = max(self.orders, default=BEFORE_FORWARD)
        self.write = write
        self.woken: list[tuple[int, Any]] = []
        self.pause_hooks: Any = None

    def moments(self) -> set[Moment]:
        return {MOMENTS[order] for order in self.orders}

    def watched_inputs(self) -> list[int]:
        return []

    def course(self, order: int, moment: LiveMoment | None) -> Iterator[None]:
        self.run(order, moment)
        yield from ()

    def run(self, order: int, moment: LiveMoment | None) -> None:
        if moment is None:
            self.woken.append((order, None))
        elif order in self.orders:
            leaf = next(leaf for leaf, _ in leaves.walk(moment.structure))
            self.woken.append((order, moment.tensor(leaf).clone()))
            if self.write is not None:
                moment.writable(leaf, (id(self), 0)).add_(self.write)


def forward(model: Twice, *programs: Program) -> torch.Tensor | None:
    interleaver = Interleaver(model, TABLE, list(programs))  # type: ignore[arg-type]
    for program in programs:
        program.run(BEFORE_FORWARD, None)
    output = None
    with interleaver.hooked():
        output = model(torch.tensor([1.0]))
    return output


def test_recording_a_forward_finds_every_moment_in_order() -> None:
    model, seen = Twice(), {}

    with recording_moments(model, seen):
        model(torch.tensor([1.0]))

    assert list(seen) == MOMENTS
    assert list(seen[MOMENTS[1]]) == ["args.0"]
    assert list(seen[MOMENTS[3]]) == ["kwargs.input"]
    assert seen[MOMENTS[4]][""].item() == 2
    assert not any(module._forward_hooks for module in model.modules())


def test_each_call_of_a_module_is_a_moment_of_its_own() -> None:
    program = Program(MOMENTS[2], MOMENTS[4], MOMENTS[7], write=100.0)

    forward(Twice(), program)

    woken = {order: value for order, value in program.woken if value is not None}
    assert {order: value.item() for order, value in woken.items()} == {2: 1, 4: 102, 7: 2020}


def test_a_written_input_reaches_the_module_by_position_and_by_name() -> None:
    watcher = Program(MOMENTS[2], MOMENTS[4], MOMENTS[7])

    forward(Twice(), Program(MOMENTS[1], MOMENTS[3], write=0.5), watcher)

    woken = {order: value for order, value in watcher.woken if value is not None}
    assert {order: value.item() for order, value in woken.items()} == {2: 1.5, 4: 3.0, 7: 30.0}


def test_programs_run_at_a_moment_in_the_order_they_joined() -> None:
    first, second = Program(MOMENTS[2], write=1.0), Program(MOMENTS[2], write=1.0)

    forward(Twice(), first, second)

    assert [first.woken[-1][1].item(), second.woken[-1][1].item()] == [1, 2]


def test_the_forward_ends_with_the_last_moment_of_any_program() -> None:
    model = Twice()

    assert forward(model, Program(MOMENTS[2]), Program(MOMENTS[4])) is None

    assert not model.finished
    assert not any(module._forward_hooks for module in model.modules())


def test_an_error_in_the_model_is_not_mistaken_for_the_end_of_the_forward() -> None:
    interleaver = Interleaver(Twice(), TABLE, [Program(MOMENTS[7])])  # type: ignore[list-item]

    try:
        with interleaver.hooked():
            raise RuntimeError("the model broke")
    except RuntimeError as error:
        assert str(error) == "the model broke"
    else:
        raise AssertionError("the error was swallowed")


def test_a_paused_module_call_wakes_nobody_and_counts_for_nothing() -> None:
    model, program = Twice(), Program(MOMENTS[2], MOMENTS[4])
    interleaver = Interleaver(model, TABLE, [program])  # type: ignore[list-item]

    with interleaver.hooked():
        with program.pause_hooks():
            model.inner(torch.tensor([7.0]))
        model(torch.tensor([1.0]))

    assert [value.item() for _, value in program.woken] == [1, 2]


def test_without_moments_no_forward_is_needed() -> None:
    program = Program()
    interleaver = Interleaver(Twice(), TABLE, [program])  # type: ignore[list-item]

    assert not interleaver.needs_forward


# ---------------------------------------------------------------- writes


def test_a_write_leaves_the_memory_that_the_model_holds_alone() -> None:
    shared = torch.zeros(1, 4)
    moment = LiveMoment({"args": (shared, shared), "kwargs": {}})
    before = moment.tensor("args.0")

    moment.writable("args.0", (1, 0))[:] = 1
    moment.writable("args.0", (1, 0))[:, 0] = 2

    assert moment.changed
    assert before is shared and not shared.any()
    assert moment.structure["args"][0].tolist() == [[2, 1, 1, 1]]
    assert moment.structure["args"][1] is shared


def test_a_written_tensor_lies_in_memory_as_it_did_before() -> None:
    # A kernel may round otherwise on another layout: a neighbour would notice the write.
    gate, _ = torch.arange(24.0).view(1, 4, 6).chunk(2, -1)
    moment = LiveMoment(gate)

    written = moment.writable("", (1, 0))

    assert written.stride() == gate.stride()
    assert torch.equal(written, gate)


def test_an_expanded_tensor_has_all_its_elements_before_it_is_written() -> None:
    moment = LiveMoment(torch.zeros(1, 1).expand(3, 2))

    moment.writable("", (1, 0))[0] = 1

    assert moment.structure.tolist() == [[1, 1], [0, 0], [0, 0]]


def test_a_hook_point_prints_as_one_would_write_it() -> None:
    assert str(point("model.layers.0.input[args.0]")) == "model.layers.0.input[args.0]"
    assert str(point("lm_head.output", call=2)) == "lm_head.output (call 2)"
    assert str(point("output[logits]")) == "output[logits]"
