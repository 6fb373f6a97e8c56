"""Gradients in a program: when they are known, and which can never be."""

from __future__ import annotations

import pytest

from ndif_actor.engine.backward import AFTER_FORWARD
from ndif_actor.engine.program import Program, compile_graph
from ndif_actor.errors import RequestError
from ndif_client.wire.messages import Fault
from tests.requests import Recorder
from tests.unit.engine.test_program import table


def compiled(recorder: Recorder, invokes: int = 1) -> Program:
    return compile_graph(recorder.graph(), table(), invokes)


def refused(recorder: Recorder, invokes: int = 1) -> Fault:
    with pytest.raises(RequestError) as refusal:
        compiled(recorder, invokes)
    return refusal.value.fault


def test_gradients_become_known_in_the_reverse_order_of_the_forward() -> None:
    recorder = Recorder()
    early, late = recorder.read("1.output"), recorder.read("3.output")
    between = recorder.apply("mul", early, 2)
    recorder.write("2.output", between)
    backward = recorder.backward(recorder.apply("sum", recorder.read("4.output")))
    first = recorder.gradient(backward, early)
    recorder.gradient(backward, between)
    recorder.gradient(backward, late)
    recorder.save(first)

    plan = compiled(recorder).at(0)

    (known,) = plan.backwards
    assert [value for value, _ in known.moments] == [late.node, between.node, early.node]
    assert plan.nodes[known.moments[2][1]] == [first.node, first.node + 3]
    assert plan.last == 4  # the forward ends there
    assert known.order >= AFTER_FORWARD


def test_what_has_a_gradient_is_written_back_and_so_ends_the_sharing_of_rows() -> None:
    recorder = Recorder()
    value = recorder.read("1.output")
    backward = recorder.backward(recorder.apply("sum", recorder.read("4.output")))
    recorder.save(recorder.gradient(backward, value))

    assert compiled(recorder).at(0).watched == {value.node}


def test_a_gradient_of_what_the_loss_does_not_depend_on_is_refused_with_both_lines() -> None:
    recorder = Recorder()
    loss = recorder.apply("sum", recorder.read("1.output"))
    later = recorder.read("3.output")
    backward = recorder.backward(loss)
    recorder.save(recorder.gradient(backward, later))

    fault = refused(recorder)

    assert "does not depend on it" in fault.message
    assert fault.source is not None and fault.source.line == 5
    assert fault.other_source is not None and fault.other_source.line == backward.node + 1


def test_rows_of_another_invoke_have_no_gradient_unless_values_cross() -> None:
    def write(*, crossing: bool) -> Recorder:
        recorder = Recorder()
        mine, other = recorder.read("1.output", 0), recorder.read("1.output", 1)
        if crossing:
            recorder.write("2.output", mine, 1)
        backward = recorder.backward(recorder.apply("sum", recorder.read("4.output", 1)))
        recorder.save(recorder.gradient(backward, mine))
        assert other
        return recorder

    assert "does not depend on it" in refused(write(crossing=False), 2).message
    assert compiled(write(crossing=True), 2)


def test_a_detached_value_passes_no_gradient_on() -> None:
    recorder = Recorder()
    value = recorder.read("1.output")
    loss = recorder.apply("sum", recorder.apply("detach", value))
    recorder.save(recorder.gradient(recorder.backward(loss), value))

    assert "does not depend on it" in refused(recorder).message


def test_a_gradient_can_be_written_with_what_is_known_by_then_only() -> None:
    recorder = Recorder()
    early, late = recorder.read("1.output"), recorder.read("3.output")
    backward = recorder.backward(recorder.apply("sum", recorder.read("4.output")))
    recorder.write_gradient(backward, late, recorder.gradient(backward, early))

    fault = refused(recorder)

    assert "reverse order" in fault.message
    assert fault.other_source is not None


def test_a_hook_point_can_not_be_written_with_a_gradient() -> None:
    recorder = Recorder()
    value = recorder.read("1.output")
    backward = recorder.backward(recorder.apply("sum", recorder.read("2.output")))
    recorder.write("4.output", recorder.gradient(backward, value))

    assert "only after the forward" in refused(recorder).message


def test_gradients_of_gradients_are_refused() -> None:
    recorder = Recorder()
    value = recorder.read("1.output")
    first = recorder.backward(recorder.apply("sum", recorder.read("2.output")))
    again = recorder.apply("sum", recorder.gradient(first, value))
    recorder.save(recorder.gradient(recorder.backward(again), value))

    assert "gradients of gradients" in refused(recorder).message


def test_what_cuts_a_gradient_off_is_named() -> None:
    recorder = Recorder()
    value = recorder.read("1.output")
    loss = recorder.apply("sum", recorder.apply("round", value))
    recorder.save(recorder.gradient(recorder.backward(loss), value))

    assert "but by round, which has no gradient" in refused(recorder).message


def test_the_gradient_of_a_part_that_was_not_used_says_where_it_is() -> None:
    recorder = Recorder()
    value = recorder.read("1.output")
    part = recorder.apply("getitem", value, 0)
    loss = recorder.backward(recorder.apply("sum", value))
    recorder.save(recorder.gradient(loss, part))

    assert r"take h.grad[...]" in refused(recorder).message


def test_a_gradient_without_a_backward_is_refused() -> None:
    recorder = Recorder()
    value = recorder.read("1.output")
    recorder.save(recorder.gradient(value, value))

    assert "no backward" in refused(recorder).message
