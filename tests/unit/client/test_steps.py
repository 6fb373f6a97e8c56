"""Steps of a generation: which block code belongs to, and which values may be used in which."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from ndif_client import Generation, Session
from ndif_client.errors import ClosedTraceError, GraphError, OrderError
from ndif_client.steps import overlap
from ndif_client.wire.graph import (
    PREFILL,
    Constant,
    Parameter,
    ReadHook,
    Save,
    Steps,
    WriteHook,
)
from tests.unit.client.trees import finished_graph

ALL = Steps()


@contextmanager
def recording(session: Session, max_new_tokens: int = 20) -> Any:
    """Record a generation that is not run."""
    gen = session.generate("x", max_new_tokens=max_new_tokens)
    gen._open()
    try:
        yield gen
    finally:
        gen._close(RuntimeError("only recorded"))


def _steps(gen: Generation, kind: type) -> list[Steps]:
    graph = finished_graph(gen)
    return [graph.steps_of(n) for n, node in enumerate(graph.nodes) if isinstance(node, kind)]


# ---------------------------------------------------------------- blocks


def test_code_outside_of_all_blocks_belongs_to_the_prefill_and_costs_no_words(
    session: Session, model: Any
) -> None:
    with session.generate("x") as gen:
        model.model.norm.output.save()
        with gen.prefill():
            model.lm_head.output.save()
    graph = finished_graph(gen)

    assert graph.steps == graph.during == []
    assert graph.steps_of(3) == PREFILL


def test_every_node_has_the_steps_of_its_block(session: Session, model: Any) -> None:
    with session.generate("x", max_new_tokens=12) as gen:
        model.model.norm.output.save()
        with gen.all():
            (model.model.norm.output[:, -1] * 2).save()
        with gen.steps[1:]:
            model.model.norm.output.save()
        with gen.steps[2:10:2]:
            model.model.norm.output = 0
        with gen.steps[3]:
            model.model.norm.output.save()

    assert _steps(gen, ReadHook) == [PREFILL, ALL, Steps(1), Steps(3, 4)]
    assert _steps(gen, Save) == [PREFILL, ALL, Steps(1), Steps(3, 4)]
    assert _steps(gen, WriteHook) == [Steps(2, 10, 2)]
    assert finished_graph(gen).steps == [PREFILL, ALL, Steps(1), Steps(2, 10, 2), Steps(3, 4)]


def test_constants_and_parameters_belong_to_the_prefill(session: Session, model: Any) -> None:
    vector = np.ones(6, dtype=np.float32)
    with session.generate("x") as gen:
        with gen.steps[1:]:
            model.model.norm.output[:, -1] += 3.0 * torch.tensor(vector)
            _ = model.model.norm.output + vector + model.lm_head.weight.sum(0)
        model.model.norm.output[:, -1] += vector

    assert _steps(gen, Constant) == [PREFILL] * 2
    assert _steps(gen, Parameter) == [PREFILL]


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (-1, "step -1 is negative"),
        (slice(-2, None), "start -2 is negative"),
        (slice(0, -1), "stop -1 is negative"),
        (slice(None, None, -1), "stride -1 is negative"),
        (slice(None, None, 0), "stride of a slice is at least 1"),
        (slice(3, 3), r"gen\.steps\[3:3\] has no steps"),
        (20, r"step 20 is never reached: max_new_tokens=20 makes steps 0 to 19"),
        (slice(25, None), "step 25 is never reached: max_new_tokens=20"),
        (True, "bool"),
        (1.5, "float"),
        ("all", "str"),
    ],
    ids=str,
)
def test_steps_that_can_not_be_are_refused_while_recording(
    session: Session, index: Any, why: str
) -> None:
    with recording(session) as gen, pytest.raises(GraphError, match=why) as refused:
        gen.steps[index]

    assert "test_steps.py" in str(refused.value)


def test_blocks_can_not_be_nested(session: Session) -> None:
    with recording(session) as gen:
        with gen.all():  # noqa: SIM117 - the outer one
            with pytest.raises(GraphError, match="can't be nested") as refused, gen.steps[1:]:
                pass
        with gen.steps[1:]:
            pass
    assert "the outer one" in str(refused.value)


def test_blocks_mean_something_only_while_their_generation_records(
    session: Session, model: Any
) -> None:
    gen = session.generate("x")
    with pytest.raises(ClosedTraceError, match="inside of the generation's own"), gen.all():
        pass
    with gen:
        model.lm_head.output.save()
        with (
            session.generate("y") as inner,
            pytest.raises(ClosedTraceError, match="generation's own"),
            gen.all(),
        ):
            pass
    with pytest.raises(ClosedTraceError, match="has ended"), gen.steps[0]:
        pass
    finished_graph(gen)
    finished_graph(inner)


def test_an_error_inside_of_a_block_ends_it(session: Session, model: Any) -> None:
    with recording(session) as gen:
        with pytest.raises(KeyError), gen.all():
            raise KeyError
        model.lm_head.output.save()

    assert _steps(gen, Save) == [PREFILL]


def test_a_trace_has_no_steps_and_names_what_has(session: Session, model: Any) -> None:
    with session.trace("x") as trace:
        model.lm_head.output.save()
        for name in ("all", "steps", "prefill"):
            with pytest.raises(AttributeError, match=r"one step; use session\.generate"):
                getattr(trace, name)
    finished_graph(trace)


def test_invokes_and_steps_cross_freely(session: Session, model: Any) -> None:
    with session.generate() as gen:
        with gen.invoke("a"), gen.steps[1:]:
            a = model.model.norm.output
        with gen.steps[1:], gen.invoke("b"):
            model.model.norm.output = a
    graph = finished_graph(gen)

    write = next(node for node in graph.nodes if isinstance(node, WriteHook))
    assert write.invoke == 1
    assert _steps(gen, WriteHook) == [Steps(1)]


# ---------------------------------------------------------------- values of other steps


def test_a_value_of_a_single_step_can_be_used_in_its_own_and_in_later_ones(
    session: Session, model: Any
) -> None:
    with recording(session) as gen:
        first = model.model.norm.output
        with gen.all():
            _ = first + 1
        with gen.steps[4]:
            fourth = model.model.norm.output + first
        with gen.steps[4:]:
            _ = fourth + model.model.norm.output
        with gen.steps[7]:
            _ = fourth + first


def test_a_value_of_many_steps_can_be_used_at_each_of_them(session: Session, model: Any) -> None:
    with recording(session) as gen:
        with gen.all():
            each = model.model.norm.output
        with pytest.raises(OrderError, match="outside of their block"):
            _ = each + 1
        with gen.steps[2:8:2]:
            _ = each + 1
        with gen.steps[5]:
            _ = each + 1


@pytest.mark.parametrize(
    ("made", "used"),
    [
        (slice(1, None), None),
        (slice(1, None), slice(None)),
        (slice(0, 8, 2), slice(0, 8)),
        (slice(0, 4), slice(0, 5)),
        (3, 2),
        (3, slice(2, None)),
        (slice(0, 8, 2), 3),
    ],
    ids=str,
)
def test_any_other_use_is_refused_with_both_lines(
    session: Session, model: Any, made: Any, used: Any
) -> None:
    with recording(session) as gen:
        with gen.steps[made]:
            value = model.model.norm.output  # made here
        with gen.steps[0 if used is None else used], pytest.raises(OrderError) as refused:
            _ = value + 1  # used here

    assert "made here" in str(refused.value)
    assert "used here" in str(refused.value)


def test_order_inside_of_a_forward_does_not_count_for_values_of_earlier_steps(
    session: Session, model: Any
) -> None:
    with recording(session) as gen:
        late = model.model.layers[2].output
        with gen.steps[1:]:
            model.model.layers[0].output[:, -1] = late[:, -1]
        with gen.all():
            doubled = late * 2
        with gen.steps[1:]:
            model.model.layers[0].output[:, -1] = doubled[:, -1]


def test_order_inside_of_a_forward_counts_for_values_of_the_same_step(
    session: Session, model: Any
) -> None:
    def refuse(late: Any) -> None:
        with pytest.raises(OrderError, match="reaches only afterwards") as refused:
            model.model.layers[0].output = late
        assert "read late" in str(refused.value)

    with recording(session) as gen:
        first = model.model.layers[2].output  # read late
        with gen.all():
            refuse(first)
            each = model.model.layers[2].output  # read late
            refuse(each + first)
        with gen.steps[3:]:
            refuse(each)
        with gen.steps[0]:
            refuse(first * 2)


# ---------------------------------------------------------------- changes and saves


def test_a_value_is_changed_in_place_only_in_its_own_block(session: Session, model: Any) -> None:
    with recording(session) as gen:
        hidden = model.model.norm.output  # read here
        total = hidden.sum()
        with gen.all():
            for change in (lambda: hidden.add_(1), lambda: total.add_(1)):
                with pytest.raises(GraphError, match=r"\.clone\(\)") as refused:
                    change()
            with pytest.raises(GraphError, match="no change is carried from step to step"):
                hidden[0][:] = 0
            own = hidden.clone()
            own += 1
        hidden[:, 0] = 0

    assert "step 0" in str(refused.value)
    assert _steps(gen, WriteHook) == [PREFILL]


def test_a_view_sees_changes_at_its_own_steps_wherever_it_is_used(
    session: Session, model: Any
) -> None:
    with recording(session) as gen:
        hidden = model.model.norm.output
        row = hidden[0]
        hidden[:] = 0
        with gen.all():
            _ = row + 1
        _ = row + 2


def test_a_hook_point_in_another_block_is_another_place(session: Session, model: Any) -> None:
    with recording(session) as gen:
        model.model.norm.output += 1
        with gen.steps[1:]:
            model.model.norm.output += 1

    assert _steps(gen, ReadHook) == _steps(gen, WriteHook) == [PREFILL, Steps(1)]


def test_the_same_value_given_in_two_blocks_is_written_in_both(
    session: Session, model: Any
) -> None:
    with recording(session) as gen:
        hidden = model.model.norm.output
        hidden += 1
        model.model.norm.output = hidden
        with gen.steps[1:]:
            model.model.norm.output = hidden

    assert _steps(gen, WriteHook) == [PREFILL, Steps(1)]


def test_a_change_that_would_undo_one_of_an_overlapping_block_is_refused(
    session: Session, model: Any
) -> None:
    with recording(session) as gen:
        hidden = model.model.norm.output
        with gen.steps[1:]:
            model.model.norm.output = 0
        hidden[:, 0] = 1
        with gen.all():
            model.model.norm.output = 0  # the other change
        with pytest.raises(GraphError, match="would undo that") as refused:
            hidden[:, 0] = 2

    assert "the other change" in str(refused.value)


def test_a_kept_structure_of_outputs_is_read_anew_in_another_block(
    session: Session, model: Any
) -> None:
    with recording(session) as gen:
        attention = model.model.layers[0].self_attn.output
        first = attention[0]
        assert attention[0] is first
        with gen.all():
            each = attention[0]
            assert attention[0] is each

    assert each is not first
    assert _steps(gen, ReadHook) == [PREFILL, ALL]


def test_a_value_is_saved_at_its_own_steps_wherever_that_is_written(
    session: Session, model: Any
) -> None:
    with session.generate("x") as gen:
        first = model.model.norm.output
        with gen.all():
            each = model.model.norm.output
            gen.first = first
        gen.each = each
        each.save("again")

    assert _steps(gen, Save) == [PREFILL, ALL]
    assert list(gen._recorder.names) == ["first", "each", "again"]


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        (PREFILL, ALL, True),
        (PREFILL, Steps(1), False),
        (Steps(0, None, 2), Steps(1, None, 2), False),
        (Steps(0, None, 2), Steps(1, None, 3), True),
        (Steps(0, 4, 2), Steps(1, 6, 5), False),
        (Steps(0, 4), Steps(4, None), False),
        (Steps(7, 8), Steps(1, None, 3), True),
        (Steps(0, None, 1000), Steps(999, None, 1001), True),
    ],
    ids=str,
)
def test_steps_overlap_where_they_have_one_in_common(
    one: Steps, other: Steps, common: bool
) -> None:
    assert overlap(one, other) is overlap(other, one) is common
