"""Traces: prompts, invokes, names of saved values, and what is refused before anything is sent."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from ndif_client import Session
from ndif_client.errors import ClosedTraceError, GraphError, NoValueError
from ndif_client.wire.graph import ReadHook, Save, WriteHook
from tests.unit.client.trees import finished_graph, scratch


def _names(trace: Any) -> list[str | None]:
    return [node.name for node in finished_graph(trace).nodes if isinstance(node, Save)]


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("text", ["text"]),
        (["one", "two"], ["one", "two"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["one", [2, 3]], ["one", [2, 3]]),
        (np.array([1, 2]), [[1, 2]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([torch.tensor([1, 2]), np.array([3])], [[1, 2], [3]]),
        (list(np.array([1, 2])), [[1, 2]]),
        (range(3), [[0, 1, 2]]),
    ],
    ids=str,
)
def test_a_prompt_is_text_or_ids_or_several_of_them(
    session: Session, prompt: Any, prompts: list[Any]
) -> None:
    trace = session.trace(prompt)

    assert trace._recorder.invokes[0].prompts == prompts


@pytest.mark.parametrize(
    "prompt", [[], [[]], 5, [1.5], [[1, "a"]], [-1], np.zeros((1, 1, 1)), [True]], ids=str
)
def test_anything_else_is_no_prompt(session: Session, prompt: Any) -> None:
    with pytest.raises(GraphError):
        session.trace(prompt)


def test_saved_values_are_called_by_their_variables(session: Session, model: Any) -> None:
    with session.trace("x") as trace:
        hidden = model.model.layers[0].output.save()
        outputs = [layer.output.save() for layer in model.model.layers]
        by_name = {"norm": model.model.norm.output.save()}
        (hidden + 1).save()

    # The first of the outputs is what `hidden` is.
    assert _names(trace) == ["outputs.0", "outputs.1", "outputs.2", "by_name.norm", "4"]
    assert list(trace._recorder.names) == ["hidden", "outputs", "by_name", "4"]
    assert len(outputs) == len(by_name) + 2


def test_an_explicit_name_beats_the_variable(session: Session, model: Any) -> None:
    with session.trace("x") as trace:
        hidden = model.model.layers[0].output.save("mine")
    assert _names(trace) == ["mine"]
    assert hidden is not None


def test_giving_a_value_to_the_trace_saves_it_under_that_name(session: Session, model: Any) -> None:
    with session.trace("x") as trace:
        trace.h = model.model.layers[0].output
        trace.several = [layer.output for layer in model.model.layers[1:]]
        trace.attention = model.model.layers[0].self_attn.output
        trace.h = trace.h + 1

    assert list(trace._recorder.names) == ["0", "several", "attention", "h"]
    with pytest.raises(AttributeError, match="nothing was saved as 'nothing'"):
        _ = trace.nothing
    finished_graph(trace)


@pytest.mark.parametrize("name", ["id", "result", "invoke"])
def test_a_traces_own_attributes_are_not_names(session: Session, model: Any, name: str) -> None:
    with scratch(session) as trace, pytest.raises(GraphError, match=f"its own {name!r}"):
        setattr(trace, name, model.model.layers[0].output)


@pytest.mark.parametrize(
    "name", ["statistics", "prompts", "tokens", "text", "completions", "steps", "", "x" * 300]
)
def test_some_names_are_not_free(session: Session, model: Any, name: str) -> None:
    with scratch(session), pytest.raises(GraphError):
        model.model.layers[0].output.save(name)


def test_two_values_can_not_have_one_name(session: Session, model: Any) -> None:
    with scratch(session):
        model.model.layers[0].output.save("h")  # the first
        with pytest.raises(GraphError, match="already that of another") as refused:
            model.model.layers[1].output.save("h")

    assert "the first" in str(refused.value)


def test_a_value_saved_twice_is_sent_once(session: Session, model: Any) -> None:
    with session.trace("x") as trace:
        h = model.model.layers[0].output.save("a")
        h.save("b")
        trace.c = h

    assert len(_names(trace)) == 1
    assert set(trace._recorder.names) == {"a", "b", "c"}


def test_a_function_saves_what_it_returns(session: Session) -> None:
    as_dict = session.trace(
        "x", lambda m: {"h": m.model.norm.output, "two": (m.lm_head.output,) * 2}
    )
    as_list = session.trace("x", lambda m: [m.model.norm.output, m.lm_head.output])
    as_value = session.trace("x", lambda m: m.model.layers[0].self_attn.output)

    assert list(as_dict._recorder.names) == ["h", "two"]
    assert list(as_list._recorder.names) == ["0", "1"]
    assert list(as_value._recorder.names) == ["value"]
    for trace in (as_dict, as_list, as_value):
        finished_graph(trace)


async def test_a_function_may_return_only_values(session: Session) -> None:
    with pytest.raises(GraphError, match="what the function returns: only values of the trace"):
        session.trace("x", lambda m: {"h": 5})
    with pytest.raises(GraphError, match="saves nothing"):
        await session.trace("x", lambda m: None)


def test_an_error_in_the_function_is_raised_as_itself(session: Session) -> None:
    with pytest.raises(ZeroDivisionError):
        session.trace("x", lambda m: 1 / 0)


def test_reads_and_writes_belong_to_the_invoke_they_stand_in(session: Session, model: Any) -> None:
    with session.trace() as trace:
        with trace.invoke("clean"):
            clean = model.model.layers[0].output
        with trace.invoke(["corrupt", "corrupted"]):
            model.model.layers[0].output = clean
            clean[:, 0] *= 1
        with trace.invoke("third"):
            model.lm_head.output.save()
    nodes = finished_graph(trace).nodes

    assert [n.invoke for n in nodes if isinstance(n, ReadHook)] == [0, 2]
    assert len(trace._recorder.invokes) == 3


def test_the_traces_own_prompt_is_the_first_invoke(session: Session, model: Any) -> None:
    with session.trace("clean") as trace:
        h = model.model.layers[0].output
        with trace.invoke("corrupt"):
            model.model.layers[0].output = h
        model.model.layers[1].output.save()
    nodes = finished_graph(trace).nodes

    assert [n.invoke for n in nodes if isinstance(n, ReadHook)] == [0, 0]
    assert [n.invoke for n in nodes if isinstance(n, WriteHook)] == [1]


def test_a_change_of_a_value_goes_to_its_own_invoke(session: Session, model: Any) -> None:
    with session.trace() as trace:
        with trace.invoke("a"):
            h = model.model.layers[0].output
        with trace.invoke("b"):
            h[:, 0] = 0
    nodes = finished_graph(trace).nodes

    assert [n.invoke for n in nodes if isinstance(n, WriteHook)] == [0]


def test_without_a_prompt_nothing_can_be_read(session: Session, model: Any) -> None:
    with pytest.raises(GraphError, match="has no prompt"), session.trace():
        pass
    with session.trace() as trace:
        with trace.invoke("a"):
            model.lm_head.output.save()
        with pytest.raises(ClosedTraceError, match="which prompt is meant"):
            _ = model.lm_head.output
    finished_graph(trace)


async def test_a_trace_that_saves_and_writes_nothing_is_refused(
    session: Session, model: Any
) -> None:
    with pytest.raises(GraphError, match="saves nothing"):
        async with session.trace("x"):
            _ = model.lm_head.output


async def test_a_forgotten_save_is_named(session: Session, model: Any) -> None:
    with session.trace("x") as trace:
        hidden = model.model.layers[0].output
        top = hidden.topk(3)
    assert top is not None
    with pytest.raises(GraphError, match=r"call \.save\(\) on 'hidden' or 'top'") as refused:
        await trace
    assert "with session.trace" in str(refused.value)


def test_a_trace_is_recorded_once(session: Session, model: Any) -> None:
    with session.trace("x") as trace:
        model.lm_head.output.save()
    with pytest.raises(ClosedTraceError, match="recorded once"), trace:
        pass
    with pytest.raises(ClosedTraceError, match="has ended"):
        trace.h = 1
    with pytest.raises(ClosedTraceError, match="has ended"):
        trace.invoke("y")
    finished_graph(trace)


def test_traces_can_be_recorded_inside_of_one_another(session: Session, model: Any) -> None:
    with session.trace("a") as outer:
        with session.trace("b") as inner:
            model.model.layers[0].output.save()
        model.lm_head.output.save()

    assert len(finished_graph(inner).nodes) == len(finished_graph(outer).nodes) == 2


def test_an_error_inside_of_the_block_ends_the_trace(session: Session, model: Any) -> None:
    with pytest.raises(KeyError), session.trace("x") as trace:
        h = model.lm_head.output.save()
        raise KeyError("mine")

    with pytest.raises(NoValueError, match="has failed"):
        _ = h.value
    with pytest.raises(NoValueError, match="has failed"):
        _ = trace.result


async def test_a_trace_can_not_be_awaited_before_it_is_recorded(session: Session) -> None:
    with pytest.raises(ClosedTraceError, match="before it was recorded"):
        await session.trace("x")
    with (
        pytest.raises(ClosedTraceError, match="inside of its own block"),
        scratch(session) as trace,
    ):
        await trace


def test_a_recorded_trace_that_never_runs_is_warned_about(session: Session, model: Any) -> None:
    def record() -> None:
        with session.trace("x"):
            model.lm_head.output.save()

    with pytest.warns(RuntimeWarning, match="never awaited"):
        record()
        gc.collect()


async def test_a_trace_that_failed_is_not_warned_about(session: Session) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(GraphError):
            await session.trace("x", lambda m: None)


def test_a_trace_says_how_far_it_is(session: Session, model: Any) -> None:
    trace = session.trace("x")
    assert "new" in repr(trace)
    with trace:
        assert "recording" in repr(trace)
        model.lm_head.output.save()
    assert "recorded" in repr(trace)
    finished_graph(trace)
    assert "failed" in repr(trace)


async def test_a_trace_goes_when_nobody_holds_it(session: Session, model: Any) -> None:
    gc.disable()  # by counting references alone: its results may be large
    try:
        with session.trace("x") as trace:
            hidden = model.model.layers[0].output
            trace.h = hidden + model.model.layers[0].output
        finished_graph(trace)
        gone = weakref.ref(trace._recorder)
        await trace.cancel()
        del trace, hidden
        assert gone() is None
    finally:
        gc.enable()
