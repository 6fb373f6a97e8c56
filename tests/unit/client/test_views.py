"""In-place changes mean what they mean in torch, and reach the hook point they came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndif_client import Session
from ndif_client.errors import GraphError
from ndif_client.wire.graph import HookPoint, WriteHook
from tests.unit.client.trees import (
    HIDDEN_SIZE,
    TOKENS,
    evaluate,
    finished_graph,
    make_session,
    scratch,
)

BATCH = 2
PROMPTS = [[1] * TOKENS, [2] * TOKENS]
HOOK = HookPoint("model.layers.1", "output")

Program = Callable[[Any], Any]


def _activations() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, TOKENS, HIDDEN_SIZE, generator=generator, dtype=torch.float64)


def _check_as_torch(program: Program) -> None:
    """What `program` returns, and leaves at the hook point, is what torch makes of a tensor."""
    session = make_session()
    with session.trace(PROMPTS) as trace:
        returned = program(session.model.model.layers[1].output)
        if returned is not None:
            returned.clone().save("returned")
        session.model.model.layers[1].output.save("after")
    got = evaluate(trace, {(HOOK, 0): _activations()})

    real = _activations()
    expected = program(real)

    assert torch.equal(got.hooks[HOOK, 0], real)
    assert torch.equal(got.saved["after"], real)
    if expected is not None:
        assert torch.equal(got.saved["returned"], expected)


def _slice_write(h: Any) -> None:
    h[:, -1] = 0


def _nested_write(h: Any) -> None:
    h[0][1:3][..., 2] = 5.0


def _augmented_slice(h: Any) -> Any:
    h[:, 1] += 3
    h[:, 1] *= 2
    return h


def _augmented_whole(h: Any) -> Any:
    h += 1.5
    h -= h.mean(-1, keepdim=True)
    h /= 4
    return h


def _write_after_view(h: Any) -> Any:
    view = h[1]
    h[1, 0] = 7
    return view * 1


def _view_of_view_sees_write_of_grandparent(h: Any) -> Any:
    inner = h[1][2]
    h[:] = h + 10
    return inner + 0


def _write_to_view_then_read_whole(h: Any) -> Any:
    view = h[0, 1:]
    view[:, 0] = -1
    view[0] = 2
    return h + 0


def _heads(h: Any) -> None:
    heads = h.view(BATCH, -1, 2, HIDDEN_SIZE // 2)
    heads[:, :, 1] = 0


def _heads_transposed(h: Any) -> None:
    heads = h.reshape(BATCH, TOKENS, 3, 2).transpose(1, 2)
    heads[:, 0] += 1


def _permuted(h: Any) -> None:
    h.permute(2, 0, 1)[0] = 9


def _unsqueezed(h: Any) -> None:
    h.unsqueeze(0)[0, 0, 0] = 1


def _squeezed(h: Any) -> None:
    h[:1].squeeze(0)[0] = 1


def _viewed_copies(h: Any) -> Any:
    copy = h.clone()
    copy.view(BATCH, TOKENS, 3, 2)[:, :, 1] = 0
    (copy * 1).unflatten(-1, (3, 2))[:, 0] = 5
    half = copy[:, 1:3]
    half.unflatten(-1, (2, 3))[:, :, 0] *= 2
    return copy


def _masks(h: Any) -> None:
    h[h > 0.5] = 0
    h[h[..., 0] < 0] = 1
    h[h[..., 1] < 0] = h[0, 0].clone()
    h[:, 0][h[:, 0] > 0] = 7


def _detached(h: Any) -> None:
    h.detach()[:, 0] = 1


def _moved(h: Any) -> None:
    h.movedim(0, 2)[0] = 1


def _copies_are_not_views(h: Any) -> Any:
    copy = h[:, [0, 2]]
    copy[:] = 0
    return copy


def _list_index_write(h: Any) -> None:
    h[:, [0, 2]] = 1
    h[:, [0, 2], [1, 3]] += 2


def _in_place_methods(h: Any) -> None:
    h[:, 0].zero_()
    h[:, 1].fill_(2)
    h[0, 2].copy_(h[1, 2])
    h[:, 3].clamp_(min=0)
    h[1].add_(1).mul_(0.5)


def _clones_are_free(h: Any) -> Any:
    clone = h.clone()
    clone[:] = 0
    clone.view(-1)[0] = 1
    return clone if isinstance(clone, torch.Tensor) else None


PROGRAMS = [
    _slice_write, _nested_write, _augmented_slice, _augmented_whole, _write_after_view,
    _view_of_view_sees_write_of_grandparent, _write_to_view_then_read_whole, _heads,
    _heads_transposed, _permuted, _unsqueezed, _squeezed, _viewed_copies, _masks, _detached,
    _moved, _copies_are_not_views, _list_index_write, _in_place_methods,
]  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__.strip("_"))
def test_a_change_in_place_means_what_it_means_in_torch(program: Program) -> None:
    _check_as_torch(program)


# ---------------------------------------------------------------- any indices

_ints = st.integers(-TOKENS, TOKENS - 1)
_bounds = st.none() | st.integers(-TOKENS - 1, TOKENS + 1)
_slices = st.builds(slice, _bounds, _bounds, st.none() | st.integers(1, 3))
# In range for every dimension: where nothing is selected the engine is stricter than torch.
_lists = st.lists(st.integers(-1, 0), min_size=1, max_size=3)
_basic = st.one_of(st.integers(-2, 1), _slices, st.just(None), st.just(...))


def _at_most_one_ellipsis(parts: tuple[Any, ...]) -> bool:
    return sum(part is ... for part in parts) <= 1


_indices = st.one_of(
    _basic, _lists, st.lists(_basic | _lists, max_size=4).map(tuple).filter(_at_most_one_ellipsis)
)
_writes = st.sampled_from(["fill", "add", "multiply", "copy"])


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(_indices, _indices, _writes), min_size=1, max_size=4))
def test_any_nesting_of_indices_is_recorded_as_torch_would_run_it(
    steps: list[tuple[Any, Any, str]],
) -> None:
    def program(h: Any) -> Any:
        for first, second, write in steps:
            part = h[first]
            if write == "fill":
                part[second] = 3
            elif write == "add":
                part[second] += 1
            elif write == "multiply":
                part *= 2
            else:
                h[first] = part * 3
        return h + 0

    try:
        program(_activations())
    except (IndexError, TypeError, RuntimeError, ValueError):
        return  # torch refuses it, and so will the server
    _check_as_torch(program)


@given(_indices)
def test_an_index_reaches_the_wire_as_torch_understands_it(index: Any) -> None:
    try:
        expected = _activations()[index]
    except (IndexError, TypeError):
        return

    session = make_session()
    with session.trace(PROMPTS) as trace:
        session.model.model.layers[1].output[index].save("part")

    assert torch.equal(evaluate(trace, {(HOOK, 0): _activations()}).saved["part"], expected)


# ---------------------------------------------------------------- writes of hook points


def _writes_of(trace: Any) -> list[WriteHook]:
    return [node for node in finished_graph(trace).nodes if isinstance(node, WriteHook)]


def test_two_reads_of_a_hook_point_are_one_tensor(session: Session, model: Any) -> None:
    with session.trace(PROMPTS) as trace:
        first, second = model.model.layers[1].output, model.model.layers[1].output
        before = first.save()
        first[:, 0] = 0
        second[:, 1] += 1
        (first * 1).save("first")
        (second * 1).save("second")
        (model.model.layers[1].output * 1).save("third")
    assert before is first
    got = evaluate(trace, {(HOOK, 0): _activations()})
    real = _activations()
    real[:, 0] = 0
    real[:, 1] += 1
    assert all(torch.equal(got.saved[name], real) for name in ("first", "second", "third"))
    assert torch.equal(got.saved["before"], _activations())
    assert torch.equal(got.hooks[HOOK, 0], real)


def test_an_augmented_assignment_of_an_output_writes_once(session: Session, model: Any) -> None:
    with session.trace("x") as trace:
        model.model.layers[1].output += 1
        model.model.layers[1].mlp.output[:, 0] += 1
        model.model.layers[1].self_attn.output[0] += 1
        model.model.layers[1].self_attn.output *= 2

    assert [str(write.hook) for write in _writes_of(trace)] == [
        "model.layers.1.output",
        "model.layers.1.mlp.output",
        "model.layers.1.self_attn.output[0]",
        "model.layers.1.self_attn.output[0]",
    ]


def test_a_saved_value_is_a_snapshot(session: Session, model: Any) -> None:
    with session.trace(PROMPTS) as trace:
        h = model.model.layers[1].output
        h.save("before")
        h[:] = 0
        h.save("after")
    got = evaluate(trace, {(HOOK, 0): _activations()})

    assert torch.equal(got.saved["before"], _activations())
    assert not got.saved["after"].any()


def test_a_change_of_a_computed_value_writes_nothing(session: Session, model: Any) -> None:
    with session.trace("x") as trace:
        h = model.model.layers[1].output + 0
        h[:, 0] = 1
        h.save()

    assert _writes_of(trace) == []


def test_a_change_through_a_lost_view_of_a_hook_point_is_refused(
    session: Session, model: Any
) -> None:
    with scratch(session) as trace, pytest.raises(GraphError, match=r"\.unfold\(") as refused:
        model.model.layers[1].output.unfold(1, 2, 1)[0] = 1

    assert _writes_of(trace) == []
    assert "unfold(1, 2, 1)[0] = 1" in str(refused.value)


def test_a_value_changed_through_a_lost_view_is_refused_only_when_used_again(
    session: Session, model: Any
) -> None:
    with scratch(session):
        base = model.model.layers[1].output * 2
        flat = base.flatten()
        flat[0] = 1
        flat.save()
        with pytest.raises(GraphError, match="changed through a reshaped view"):
            base.save()


def test_a_parameter_is_read_only(session: Session, model: Any) -> None:
    with scratch(session):
        weight = model.lm_head.weight
        with pytest.raises(GraphError, match=r"lm_head\.weight belongs to the model"):
            weight[0] = 0
        with pytest.raises(GraphError, match="read-only"):
            weight[0][1] = 0
        changed = weight.clone()
        changed[0] = 0
        changed.save()


def test_a_value_given_to_the_model_can_not_be_changed_any_more(
    session: Session, model: Any
) -> None:
    with scratch(session):
        value = model.model.layers[0].output * 2
        model.model.layers[1].output = value
        with pytest.raises(GraphError, match="has been given to the model"):
            value[0] = 0


def test_an_integer_hook_point_is_read_only(session: Session, model: Any) -> None:
    with scratch(session), pytest.raises(GraphError, match="holds int64 and is read-only"):
        model.model.embed_tokens.input[:, 0] = 5


def test_a_change_that_would_undo_another_one_is_refused(session: Session, model: Any) -> None:
    with scratch(session):
        early = model.model.layers[1].output
        model.model.layers[1].output = early * 0  # the other one
        with pytest.raises(GraphError, match="would undo that") as refused:
            early[:, 1] = 0
        early.save()
        late = model.model.layers[1].output
        late[:, 1] = 0
        late[:, 2] = 0

    assert "the other one" in str(refused.value)
