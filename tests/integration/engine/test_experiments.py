"""What researchers do to a model, alone and sharing a forward, against plain hooks run alone."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import LoadEngine, LoadOracle
from tests.integration.engine.experiments import EXPERIMENTS, RAGGED, Experiment
from tests.requests import (
    EXACT,
    Recorder,
    Request,
    assert_equal,
    every_family,
    landmarks,
    precision,
    run_and_save,
)

every_experiment = pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda e: e.__name__)


@every_family
@every_experiment
def test_alone_in_its_forward_an_experiment_equals_plain_hooks(
    family: str, experiment: Experiment, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    dtype, tolerance = precision(family, padded=experiment in RAGGED)
    request = experiment(landmarks(family))

    (values,) = run_and_save(load_engine(family, dtype), [request])

    assert_equal(values, request.on(load_oracle(family, dtype)), tolerance)


@every_family
def test_with_others_in_its_forward_an_experiment_still_equals_plain_hooks(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    dtype, tolerance = precision(family)
    requests = [experiment(landmarks(family)) for experiment in EXPERIMENTS]
    requests += [noise(landmarks(family).block, number) for number in range(32 - len(requests))]
    assert len(requests) == 32

    together = run_and_save(load_engine(family, dtype), requests)

    for request, values in zip(requests, together, strict=True):
        assert_equal(values, request.on(load_oracle(family, dtype)), tolerance)


def noise(block: str, number: int) -> Request:
    """A request with a prompt and a change of its own."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(300, (1 + 3 * number % 11,), generator=generator).tolist()
    recorder = Recorder()
    before = recorder.read(f"{block}.output")
    factor = recorder.constant(torch.rand(48, generator=generator, dtype=torch.float64))
    recorder.write(f"{block}.output", recorder.apply("mul", before, factor))
    recorder.save(recorder.read("output[logits]"))
    return Request(recorder, [[ids]])


def test_a_saved_value_is_a_snapshot_of_its_moment(load_engine: LoadEngine) -> None:
    recorder = Recorder()
    before = recorder.read("model.layers.1.output")
    row = recorder.apply("getitem", before, (slice(None), 2))  # a view of the batch
    recorder.write("model.layers.1.output", 7.0)
    after = recorder.read("model.layers.1.output")
    recorder.write("model.layers.1.output", 8.0)
    late = recorder.read("lm_head.output")
    for value in (before, row, after, late):
        recorder.save(value)

    saved = list(run_and_save(load_engine("llama"), [Request(recorder, [[[1, 2, 3]]])])[0].values())

    assert not (saved[0] == 7).any()
    assert torch.equal(saved[1], saved[0][:, 2])
    assert (saved[2] == 7).all()


def test_a_value_kept_for_later_does_not_follow_what_the_model_does_to_its_memory(
    load_engine: LoadEngine,
) -> None:
    engine = load_engine("llama")
    recorder = Recorder()
    hidden = recorder.read("model.layers.0.output")
    recorder.save(hidden)
    row = recorder.apply("getitem", hidden, (slice(None), 1))
    recorder.write("model.layers.2.output", 0.0)
    recorder.save(
        recorder.apply(
            "add", row, recorder.apply("mul", recorder.read("lm_head.input[args.0]"), 0.0)
        )
    )
    in_place = engine._model.model.model.layers[1].register_forward_pre_hook(
        lambda module, args: args[0].add_(1)
    )

    try:
        (values,) = run_and_save(engine, [Request(recorder, [[[1, 2, 3]]])])
    finally:
        in_place.remove()

    kept = list(values.values())
    assert torch.equal(kept[1], kept[0][:, [1]].expand(1, 3, 48))


def test_the_forward_ends_after_the_last_hook_point_that_anybody_needs(
    load_engine: LoadEngine,
) -> None:
    engine = load_engine("llama")
    reached = []
    model = engine._model.model
    handles = [
        model.get_submodule(f"model.layers.{n}").register_forward_pre_hook(
            lambda *_, n=n: reached.append(n)
        )
        for n in range(3)
    ]
    early, later = Recorder(), Recorder()
    early.save(early.read("model.layers.0.output"))
    later.save(later.read("model.layers.1.self_attn.q_proj.output"))
    constant = Recorder()
    constant.save(constant.parameter("lm_head.weight"))

    try:
        run_and_save(engine, [Request(early, [[[1, 2]]])])
        assert reached == [0]
        run_and_save(engine, [Request(early, [[[1, 2]]]), Request(later, [[[3]]])])
        assert reached == [0, 0, 1]
        run_and_save(engine, [Request(constant, [[[1, 2]]])])
        assert reached == [0, 0, 1]
    finally:
        for handle in handles:
            handle.remove()


def test_a_request_may_save_a_tuple_as_a_whole(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    recorder = Recorder()
    logits = recorder.read("output[logits]")
    recorder.save(recorder.apply("max", logits, -1))
    recorder.save(recorder.apply("unbind", logits, 1))
    request = Request(recorder, [[[1, 2, 3]]])

    (values,) = run_and_save(load_engine("llama"), [request])

    wanted = request.on(load_oracle("llama"))
    assert [len(values[2]), len(values[4])] == [2, 3]
    assert_equal(values, wanted, EXACT)


def test_constants_of_any_shape_and_dtype_arrive(load_engine: LoadEngine) -> None:
    tensors = [
        torch.tensor(2.5),
        torch.zeros(0, 3, dtype=torch.int32),
        torch.tensor([True, False]),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([[1 + 2j]]),
        torch.arange(5, dtype=torch.uint8),
    ]
    recorder = Recorder()
    for tensor in tensors:
        recorder.save(recorder.constant(tensor))

    (values,) = run_and_save(load_engine("llama"), [Request(recorder, [[[1]]])])

    for value, tensor in zip(values.values(), tensors, strict=True):
        torch.testing.assert_close(value, tensor, rtol=0, atol=0)
