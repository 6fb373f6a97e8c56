"""Gradients, held against autograd on plain transformers with plain PyTorch hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ndif_client.wire.graph import Dtype
from tests.conftest import LoadEngine, LoadOracle
from tests.integration.engine.experiments import COLOSSEUM, EIFFEL
from tests.oracle import Saved
from tests.requests import (
    LLAMA,
    Recorder,
    Request,
    assert_equal,
    assert_same_gradients,
    differentiated,
    every_family,
    landmarks,
    precision,
    run,
    run_and_save,
    saved,
    touchable,
)

RIGHT, WRONG = 7, 11


@contextmanager
def hooks(model: Any, functions: Mapping[str, Callable[[torch.Tensor], Any]]) -> Iterator[None]:
    """Within the block, each module's output (its first tensor) becomes what its function says."""

    def changed(function: Callable[[torch.Tensor], Any], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        made = function(first)
        made = first if made is None else made
        return (made, *output[1:]) if isinstance(output, tuple) else made

    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output, function=function: changed(function, output)
        )
        for path, function in functions.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, RIGHT] - logits[0, -1, WRONG]


def record_difference(recorder: Recorder, invoke: int = 0) -> Any:
    logits = recorder.read("output[logits]", invoke)
    right = recorder.apply("getitem", logits, (0, -1, RIGHT))
    return recorder.apply("sub", right, recorder.apply("getitem", logits, (0, -1, WRONG)))


def local_gradients(model: Any, paths: list[str], ids: list[int]) -> dict[str, torch.Tensor]:
    """Return d difference / d output of each module, as a researcher would find it."""
    kept: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def function(output: torch.Tensor) -> torch.Tensor:
            mine = output if output.requires_grad else output.detach().requires_grad_()
            mine.retain_grad()
            kept[path] = mine
            return mine

        return function

    with hooks(model, {path: keep(path) for path in paths}):
        difference(model(torch.tensor([ids]), use_cache=False).logits).backward()
    return {path: tensor.grad for path, tensor in kept.items() if tensor.grad is not None}


def place(family: str, path: str) -> str:
    """The first tensor of a module's output."""
    return f"{path}.output[0]" if path == landmarks(family).attention else f"{path}.output"


def attribution(family: str, paths: list[str], ids: list[int]) -> Request:
    """Save the gradient of the logit difference for the output of each module."""
    recorder = Recorder()
    values = [recorder.read(place(family, path)) for path in paths]
    backward = recorder.backward(record_difference(recorder))
    for value in values:
        recorder.save(recorder.gradient(backward, value))
    return Request(recorder, [[ids]])


def in_order(values: Saved) -> list[Any]:
    return [values[node] for node in sorted(values)]


@every_family
def test_gradients_equal_those_of_plain_autograd(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    dtype, tolerance = precision(family)
    marks = landmarks(family)
    paths = [marks.block, marks.attention, marks.mlp, marks.next_block, marks.norm]
    wanted = local_gradients(load_oracle(family, dtype).model, paths, EIFFEL)

    (values,) = run_and_save(load_engine(family, dtype), [attribution(family, paths, EIFFEL)])

    for path, gradient in zip(paths, in_order(values), strict=True):
        torch.testing.assert_close(gradient, wanted[path], rtol=0, atol=tolerance)


@every_family
def test_gradients_at_every_hook_point_equal_those_of_plain_autograd(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    dtype, tolerance = precision(family)
    engine = load_engine(family, dtype)
    requests = [differentiated([point], EIFFEL, "output[logits]") for point in touchable(engine)]

    results, buffers = run(engine, requests)

    oracle = load_oracle(family, dtype)
    assert_same_gradients(requests, results, buffers, oracle, 100 * tolerance)


@every_family
def test_gradients_in_a_shared_batch_equal_those_alone(
    family: str, load_engine: LoadEngine
) -> None:
    dtype, tolerance = precision(family)
    engine, marks = load_engine(family, dtype), landmarks(family)
    requests = [
        attribution(family, [marks.block, marks.mlp], EIFFEL),
        attribution(family, [marks.next_block], COLOSSEUM),
        attribution(family, [marks.attention, marks.block], EIFFEL),
        attribution(family, [marks.norm], EIFFEL[:2]),
    ]

    together = run_and_save(engine, requests)

    for request, values in zip(requests, together, strict=True):
        (alone,) = run_and_save(engine, [request])
        assert_equal(values, alone, tolerance)


def test_equal_prompts_have_gradients_of_their_own(load_engine: LoadEngine) -> None:
    recorder = Recorder()
    losses = []
    values = []
    for invoke, scale in enumerate((1.0, -2.0)):
        values.append(recorder.read("model.layers.1.output", invoke))
        losses.append(recorder.apply("mul", record_difference(recorder, invoke), scale))
    backward = recorder.backward(recorder.apply("add", *losses))
    for value in values:
        recorder.save(recorder.gradient(backward, value))
    request = Request(recorder, [[EIFFEL], [EIFFEL]])

    (values_saved,) = run_and_save(load_engine("llama"), [request])

    first, second = in_order(values_saved)
    assert first.abs().sum() > 0
    torch.testing.assert_close(second, -2 * first, rtol=0, atol=1e-10)


def test_a_written_gradient_flows_on_to_earlier_values(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    model = load_oracle("llama").model
    kept: dict[str, torch.Tensor] = {}

    def keep_first(output: torch.Tensor) -> torch.Tensor:
        kept["first"] = output.detach().requires_grad_()
        return kept["first"]

    def scale_last(output: torch.Tensor) -> None:
        def hook(gradient: torch.Tensor) -> torch.Tensor:
            kept["before"] = gradient
            changed = gradient.clone()
            changed[:, -1] = 0
            return changed * 2

        output.register_hook(hook)

    with hooks(model, {"model.layers.0": keep_first, "model.layers.1": scale_last}):
        difference(model(torch.tensor([EIFFEL]), use_cache=False).logits).backward()

    recorder = Recorder()
    early = recorder.read("model.layers.0.output")
    late = recorder.read("model.layers.1.output")
    backward = recorder.backward(record_difference(recorder))
    before = recorder.gradient(backward, late)
    index = (slice(None), -1)
    changed = recorder.apply("mul", recorder.apply("setitem", before, index, 0), 2)
    recorder.write_gradient(backward, late, changed)
    recorder.save(before)
    recorder.save(recorder.gradient(backward, late))
    recorder.save(recorder.gradient(backward, early))

    (values,) = run_and_save(load_engine("llama"), [Request(recorder, [[EIFFEL]])])

    seen, written, first = in_order(values)
    torch.testing.assert_close(seen, kept["before"], rtol=0, atol=1e-10)
    after = kept["before"].clone()
    after[:, -1] = 0
    torch.testing.assert_close(written, 2 * after, rtol=0, atol=1e-10)
    torch.testing.assert_close(first, kept["first"].grad, rtol=0, atol=1e-10)


def test_several_backwards_each_have_their_own_gradients(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    model = load_oracle("llama").model
    wanted = []
    for token in (RIGHT, WRONG):
        kept = []

        def keep(output: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[0]

        with hooks(model, {"model.layers.1": keep}):
            model(torch.tensor([EIFFEL]), use_cache=False).logits[0, -1, token].backward()
        wanted.append(kept[0].grad)

    recorder = Recorder()
    hidden = recorder.read("model.layers.1.output")
    logits = recorder.read("output[logits]")
    for token in (RIGHT, WRONG):
        backward = recorder.backward(recorder.apply("getitem", logits, (0, -1, token)))
        recorder.save(recorder.gradient(backward, hidden))

    (values,) = run_and_save(load_engine("llama"), [Request(recorder, [[EIFFEL]])])

    for value, gradient in zip(in_order(values), wanted, strict=True):
        torch.testing.assert_close(value, gradient, rtol=0, atol=1e-10)


def test_a_steering_vector_of_the_user_has_a_gradient(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    vector = torch.linspace(-1, 1, 48, dtype=torch.float64)
    model = load_oracle("llama").model
    own = vector.clone().requires_grad_()
    with hooks(model, {"model.layers.1": lambda output: output.detach() + own}):
        logits = model(torch.tensor([EIFFEL]), use_cache=False).logits
        wanted = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(EIFFEL[1:]))
        wanted.backward()

    recorder = Recorder()
    steering = recorder.constant(vector)
    targets = recorder.constant(torch.tensor(EIFFEL[1:]))
    hidden = recorder.read("model.layers.1.output")
    recorder.write("model.layers.1.output", recorder.apply("add", hidden, steering))
    logits_read = recorder.read("output[logits]")
    predicted = recorder.apply("getitem", logits_read, (0, slice(None, -1)))
    loss = recorder.apply("cross_entropy", predicted, targets)
    backward = recorder.backward(loss)
    recorder.save(loss)
    recorder.save(recorder.gradient(backward, steering))

    (values,) = run_and_save(load_engine("llama"), [Request(recorder, [[EIFFEL]])])

    seen, gradient = in_order(values)
    torch.testing.assert_close(seen, wanted.detach(), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, own.grad, rtol=0, atol=1e-10)


def test_values_between_two_hook_points_have_gradients(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    model = load_oracle("llama").model
    kept = []

    def double(output: torch.Tensor) -> torch.Tensor:
        kept.append((output.detach() * 2).requires_grad_())
        return kept[0] + 1

    with hooks(model, {"model.layers.1.mlp": double}):
        difference(model(torch.tensor([EIFFEL]), use_cache=False).logits).backward()

    recorder = Recorder()
    doubled = recorder.apply("mul", recorder.read("model.layers.1.mlp.output"), 2)
    recorder.write("model.layers.1.mlp.output", recorder.apply("add", doubled, 1))
    backward = recorder.backward(record_difference(recorder))
    recorder.save(recorder.gradient(backward, doubled))

    (values,) = run_and_save(load_engine("llama"), [Request(recorder, [[EIFFEL]])])

    torch.testing.assert_close(in_order(values)[0], kept[0].grad, rtol=0, atol=1e-10)


def test_gradients_cross_invokes(load_engine: LoadEngine, load_oracle: LoadOracle) -> None:
    """The Eiffel prompt is patched with what the Colosseum prompt made; both have gradients."""
    model = load_oracle("llama").model
    kept: dict[str, torch.Tensor] = {}

    def keep(output: torch.Tensor) -> torch.Tensor:
        kept["source"] = output.detach().requires_grad_()
        return kept["source"]

    with hooks(model, {"model.layers.0": keep}):
        clean = model(torch.tensor([COLOSSEUM]), use_cache=False).logits

    def patch(output: torch.Tensor) -> torch.Tensor:
        patched = output.clone()
        patched[:, -1] = kept["source"][:, -1]
        return patched

    with hooks(model, {"model.layers.0": patch}):
        patched = model(torch.tensor([EIFFEL]), use_cache=False).logits
    (difference(patched) + difference(clean)).backward()

    recorder = Recorder()
    source = recorder.read("model.layers.0.output", 0)
    target = recorder.read("model.layers.0.output", 1)
    last = recorder.apply("getitem", source, (slice(None), -1))
    moved = recorder.apply("setitem", target, (slice(None), -1), last)
    recorder.write("model.layers.0.output", moved, 1)
    loss = recorder.apply("add", record_difference(recorder, 1), record_difference(recorder, 0))
    backward = recorder.backward(loss)
    recorder.save(recorder.gradient(backward, source))
    request = Request(recorder, [[COLOSSEUM], [EIFFEL]])

    (values,) = run_and_save(load_engine("llama"), [request])

    torch.testing.assert_close(in_order(values)[0], kept["source"].grad, rtol=0, atol=1e-10)


def test_prompts_of_unequal_length_have_gradients(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    prompts = [EIFFEL, EIFFEL[:3]]
    model = load_oracle("llama").model
    wanted = [local_gradients(model, ["model.layers.1"], ids)["model.layers.1"] for ids in prompts]

    recorder = Recorder()
    hidden = recorder.read("model.layers.1.output")
    logits = recorder.read("output[logits]")
    last = recorder.apply("getitem", logits, (slice(None), -1))
    right = recorder.apply("getitem", last, (slice(None), RIGHT))
    wrong = recorder.apply("getitem", last, (slice(None), WRONG))
    loss = recorder.apply("sum", recorder.apply("sub", right, wrong))
    recorder.save(recorder.gradient(recorder.backward(loss), hidden))

    (values,) = run_and_save(load_engine("llama"), [Request(recorder, [prompts])])

    (gradient,) = in_order(values)
    torch.testing.assert_close(gradient[:1], wanted[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient[1:, -3:], wanted[1], rtol=0, atol=1e-10)
    assert gradient[1, :-3].abs().sum() == 0


def test_a_vector_is_differentiated_with_the_gradient_it_is_given(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    weights = torch.linspace(0, 1, 48, dtype=torch.float64)
    model = load_oracle("llama").model
    kept: dict[str, torch.Tensor] = {}

    def keep(output: torch.Tensor) -> torch.Tensor:
        kept["early"] = output.detach().requires_grad_()
        return kept["early"]

    def last(output: torch.Tensor) -> None:
        output[0, -1].backward(weights)

    with hooks(model, {"model.layers.0": keep, "model.layers.2": last}):
        model(torch.tensor([EIFFEL]), use_cache=False)

    recorder = Recorder()
    early = recorder.read("model.layers.0.output")
    row = recorder.apply("getitem", recorder.read("model.layers.2.output"), (0, -1))
    backward = recorder.backward(row, recorder.constant(weights))
    recorder.save(recorder.gradient(backward, early))

    (values,) = run_and_save(load_engine("llama"), [Request(recorder, [[EIFFEL]])])

    torch.testing.assert_close(in_order(values)[0], kept["early"].grad, rtol=0, atol=1e-10)


def failing_in_the_forward() -> Request:
    recorder = Recorder()
    hidden = recorder.read("model.layers.1.output")
    index = recorder.constant(torch.tensor([1000]))
    recorder.save(recorder.apply("index_select", hidden, 1, index))
    backward = recorder.backward(record_difference(recorder))
    recorder.save(recorder.gradient(backward, hidden))
    return Request(recorder, [[EIFFEL]])


def failing_in_the_backward() -> Request:
    recorder = Recorder()
    hidden = recorder.read("model.layers.1.output")
    backward = recorder.backward(record_difference(recorder))
    gradient = recorder.gradient(backward, hidden)
    index = recorder.constant(torch.tensor([1000]))
    recorder.save(recorder.apply("index_select", gradient, 1, index))
    return Request(recorder, [[EIFFEL]])


def without_a_way_for_gradients() -> Request:
    recorder = Recorder()
    hidden = recorder.read("model.layers.1.output")
    whole = recorder.apply("to", record_difference(recorder), Dtype("int64"))
    loss = recorder.apply("to", whole, Dtype("float64"))
    recorder.save(recorder.gradient(recorder.backward(loss), hidden))
    return Request(recorder, [[EIFFEL]])


def poisoned() -> Request:
    recorder = Recorder()
    hidden = recorder.read("model.layers.0.output")
    recorder.write("model.layers.0.output", recorder.apply("mul", hidden, float("nan")))
    backward = recorder.backward(record_difference(recorder))
    recorder.save(recorder.gradient(backward, hidden))
    return Request(recorder, [[EIFFEL]])


@pytest.mark.parametrize(
    ("neighbour", "message"),
    [
        (failing_in_the_forward, "index"),
        (failing_in_the_backward, "index"),
        (without_a_way_for_gradients, "nothing to differentiate"),
        (poisoned, None),
    ],
)
def test_a_failing_neighbour_leaves_gradients_alone(
    neighbour: Callable[[], Request], message: str | None, load_engine: LoadEngine
) -> None:
    engine = load_engine("llama")
    good = attribution("llama", [LLAMA.block, LLAMA.mlp], COLOSSEUM)
    (alone,) = run_and_save(engine, [good])

    results, buffers = run(engine, [good, neighbour(), good])

    for mine in (results[0], results[2]):
        assert_equal(saved(mine, buffers), alone, 1e-10)
    fault = results[1].fault
    assert (fault is None) == (message is None)
    if message is not None:
        assert fault is not None and message in fault.message and fault.source is not None


def test_what_autograd_refuses_fails_one_request_alone(load_engine: LoadEngine) -> None:
    engine = load_engine("llama")
    good = attribution("llama", [LLAMA.block, LLAMA.mlp], COLOSSEUM)
    (alone,) = run_and_save(engine, [good])
    recorder = Recorder()
    hidden = recorder.read("model.layers.1.output")
    loss = recorder.apply("sum", recorder.apply("cdist", hidden, hidden, 0.0))
    recorder.save(recorder.gradient(recorder.backward(loss), hidden))

    results, buffers = run(engine, [good, Request(recorder, [[EIFFEL]]), good])

    for mine in (results[0], results[2]):
        assert_equal(saved(mine, buffers), alone, 1e-10)
