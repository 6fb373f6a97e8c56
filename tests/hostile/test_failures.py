"""A request that fails while it runs fails alone, and says at which of its lines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from msgspec.structs import replace

from ndif_actor.messages import GroupResult
from tests.conftest import LoadEngine, LoadOracle
from tests.integration.engine.experiments import EXPERIMENTS
from tests.requests import EXACT, LLAMA, Recorder, Request, assert_equal, run, saved

PROMPT = [5, 6, 7, 8]


def index_far_out(recorder: Recorder) -> int:
    logits = recorder.read("model.layers.1.mlp.output")
    far = recorder.apply("add", recorder.apply("argmax", logits, -1), 10_000)
    recorder.save(recorder.apply("getitem", logits, (slice(None), far)))
    return far.node + 1


def look_up_an_unknown_token(recorder: Recorder) -> int:
    logits = recorder.read("model.layers.1.mlp.output")
    far = recorder.apply("add", recorder.apply("argmax", logits, -1), 10_000)
    called = recorder.call("model.embed_tokens", far)
    recorder.save(called)
    return called.node


def multiply_unequal_dtypes(recorder: Recorder) -> int:
    hidden = recorder.read("model.layers.1.output")
    called = recorder.call("lm_head", recorder.apply("zeros_like", hidden, dtype=None))
    recorder.save(recorder.apply("matmul", called, recorder.constant(torch.zeros(300).half())))
    return called.node + 2


def write_a_wrong_shape(recorder: Recorder) -> int:
    value = recorder.constant(torch.zeros(3, 3, 3))
    return recorder.write("model.layers.1.output", value).node


def fail_beside_a_value_for_later(recorder: Recorder) -> int:
    hidden = recorder.read("model.layers.0.output")
    kept = recorder.apply("sin", hidden)  # made in the same moment, used in a later one
    far = recorder.apply("add", recorder.apply("argmax", hidden, -1), 10_000)
    recorder.save(recorder.apply("getitem", hidden, (slice(None), far)))
    recorder.write("model.layers.1.output", kept)
    return far.node + 1


FAILURES: tuple[Callable[[Recorder], int], ...] = (
    index_far_out,
    look_up_an_unknown_token,
    multiply_unequal_dtypes,
    write_a_wrong_shape,
    fail_beside_a_value_for_later,
)


def failed(result: GroupResult) -> str:
    assert result.fault is not None
    return result.fault.message


@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: f.__name__)
def test_a_failing_node_fails_its_own_request_and_no_other(
    failure: Callable[[Recorder], int], load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    recorder = Recorder()
    recorder.save(recorder.read("model.layers.0.output"))
    node = failure(recorder)
    recorder.write("model.layers.2.output", 0.0)
    neighbours = [experiment(LLAMA) for experiment in EXPERIMENTS]

    results, buffers = run(load_engine("llama"), [*neighbours, Request(recorder, [[PROMPT]])])

    early = Recorder()
    early.save(early.read("model.layers.0.output"))
    before = saved(replace(results[-1], fault=None), buffers)
    assert_equal(before, Request(early, [[PROMPT]]).on(load_oracle("llama")), EXACT)
    fault = results[-1].fault
    assert fault is not None and fault.kind == "execution"
    assert fault.node == node
    assert str(fault.source) == f"experiment.py:{node + 1}: line {node + 1}"
    for request, result in zip(neighbours, results[:-1], strict=True):
        assert_equal(saved(result, buffers), request.on(load_oracle("llama")), EXACT)


def test_ids_are_checked_before_any_embedding_looks_them_up(load_engine: LoadEngine) -> None:
    # On a device, the lookup itself would break the process of everybody.
    recorder = Recorder()
    look_up_an_unknown_token(recorder)

    results, _ = run(load_engine("gemma"), [Request(recorder, [[PROMPT]])])

    assert "is out of range [0, 300)" in failed(results[0])


def test_a_request_that_failed_writes_no_more(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    # Two invokes of one request share its failure; the neighbour has the same prompt.
    recorder = Recorder()
    index_far_out(recorder)
    recorder.write("model.layers.2.output", float("nan"))
    watcher = Recorder()
    watcher.save(watcher.read("output[logits]"))

    results, buffers = run(
        load_engine("llama"),
        [Request(recorder, [[PROMPT]]), Request(watcher, [[PROMPT]])],
    )

    assert "is out of range" in failed(results[0])
    wanted = {1: load_oracle("llama").logits(PROMPT)}
    assert_equal(saved(results[1], buffers), wanted, EXACT)


def test_a_graph_that_can_not_be_compiled_fails_alone(load_engine: LoadEngine) -> None:
    broken, fine = Recorder(), Recorder()
    broken.save(broken.read("model.layers.7.output"))
    fine.save(fine.read("model.layers.0.output"))

    results, _ = run(load_engine("llama"), [Request(broken, [[PROMPT]]), Request(fine, [[PROMPT]])])

    assert "did you mean 'model.layers." in failed(results[0])
    assert results[1].fault is None


def test_a_failure_before_the_forward_does_not_stop_it(load_engine: LoadEngine) -> None:
    broken, fine = Recorder(), Recorder()
    far = broken.constant(torch.tensor([999]))
    broken.save(broken.apply("getitem", broken.parameter("model.norm.weight"), far))
    fine.save(fine.read("output[logits]"))

    results, _ = run(load_engine("llama"), [Request(broken, [[PROMPT]]), Request(fine, [[PROMPT]])])

    assert "index 999 is out of range [-48, 48)" in failed(results[0])
    assert results[1].fault is None


def test_a_pass_in_which_everybody_fails_is_still_a_pass(load_engine: LoadEngine) -> None:
    requests = []
    for failure in FAILURES:
        recorder = Recorder()
        failure(recorder)
        requests.append(Request(recorder, [[PROMPT]]))

    results, buffers = run(load_engine("llama"), requests)

    assert all(failed(result) for result in results)
    assert buffers == []
