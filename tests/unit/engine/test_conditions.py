"""Conditions in a program: what runs under them, and what may use what they make."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from ndif_actor.engine.program import Program, compile_graph
from ndif_actor.errors import RequestError
from ndif_client.wire.graph import MAX_CONDITION_DEPTH, Condition
from ndif_client.wire.messages import Fault
from tests.requests import Recorder
from tests.unit.engine.test_program import table


def compiled(recorder: Recorder) -> Program:
    return compile_graph(recorder.graph(), table(), 1)


def refused(recorder: Recorder) -> Fault:
    with pytest.raises(RequestError) as refusal:
        compiled(recorder)
    return refusal.value.fault


def test_a_node_runs_when_what_decides_about_it_is_known() -> None:
    recorder = Recorder()
    late = recorder.read("3.output")
    early = recorder.read("1.output")
    with recorder.when(recorder.apply("any", late)):
        doubled = recorder.apply("mul", early, 2)
        recorder.save(doubled)

    plan = compiled(recorder).at(0)

    assert doubled.node in plan.nodes[3]
    assert early.node in plan.nodes[1] and early.node in plan.outlives


def test_a_write_that_would_be_decided_too_late_is_refused() -> None:
    recorder = Recorder()
    value = recorder.read("1.output")
    condition = recorder.apply("any", recorder.read("3.output"))
    with recorder.when(condition):
        recorder.write("1.output", value)

    fault = refused(recorder)

    assert "only afterwards" in fault.message
    assert fault.source is not None and fault.source.line == 4
    assert fault.other_source is not None and fault.other_source.line == 2


def test_what_a_branch_makes_stays_in_it_unless_it_is_chosen() -> None:
    recorder = Recorder()
    value = recorder.read("1.output")
    condition = recorder.apply("any", value)
    with recorder.when(condition):
        inner = recorder.apply("mul", value, 2)
        with recorder.when(recorder.apply("all", value)):
            recorder.save(recorder.apply("add", inner, 1))  # deeper is allowed
    recorder.save(recorder.choose(condition, inner, value))
    assert compiled(recorder)

    recorder.save(recorder.choose(condition, value, inner))
    assert "need not hold" in refused(recorder).message


def test_another_branch_is_no_way_out() -> None:
    recorder = Recorder()
    value = recorder.read("1.output")
    condition = recorder.apply("any", value)
    with recorder.when(condition):
        inner = recorder.apply("mul", value, 2)
    with recorder.when(condition, negated=True):
        recorder.save(recorder.apply("add", inner, 1))

    assert "need not hold" in refused(recorder).message


def test_backwards_and_the_values_they_are_for_are_unconditional() -> None:
    recorder = Recorder()
    value = recorder.read("1.output")
    loss = recorder.apply("sum", recorder.read("4.output"))
    with recorder.when(recorder.apply("any", value)):
        recorder.backward(loss)
    assert "in any case" in refused(recorder).message

    recorder = Recorder()
    value = recorder.read("1.output")
    with recorder.when(recorder.apply("any", value)):
        inner = recorder.apply("mul", value, 2)
        recorder.write("2.output", inner)
    backward = recorder.backward(recorder.apply("sum", recorder.read("4.output")))
    recorder.save(recorder.gradient(backward, inner))
    assert "need not hold" in refused(recorder).message


def test_conditions_that_make_no_sense_are_refused() -> None:
    recorder = Recorder()
    recorder.save(recorder.read("1.output"))
    graph = recorder.graph()
    for conditions, under in (
        ([Condition(5)], [0, 0]),
        ([Condition(0, False, 1)], [0, 0]),
        ([Condition(0)], [0]),
        ([Condition(0)], [0, 2]),
        ([Condition(0, False, n) for n in range(MAX_CONDITION_DEPTH + 1)], [0, 0]),
        ([Condition(1)], [0, 1]),
    ):
        with pytest.raises(RequestError):
            compile_graph(replace(graph, conditions=conditions, under=under), table(), 1)
