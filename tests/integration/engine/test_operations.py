"""Operations inside of forwards, held against functions of transformers exchanged by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from ndif_actor.engine.moments import recording_moments
from ndif_client.wire.graph import HookPoint
from tests.conftest import LoadEngine, LoadOracle
from tests.integration.engine.experiments import COLOSSEUM, EIFFEL, SHORT
from tests.requests import (
    EXACT,
    LLAMA,
    Recorder,
    Request,
    assert_equal,
    landmarks,
    point,
    run,
    run_and_save,
)

ROTARY = ("llama", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "phi3", "qwen3_moe")
ATTENDING = (*ROTARY, "gpt2")

#: The layer that is looked into.
LAYER = 1

Change = Callable[[Any], Any]


class ByHand:
    """A function of the library, wrapped by hand: what layer 1 gave it, and took from it."""

    def __init__(self, function: Any, before: Change | None, after: Change | None) -> None:
        self.function = function
        self.before, self.after = before, after
        self.calls = 0
        self.args: Any = None
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls != LAYER + 1:
            return self.function(*args, **kwargs)
        self.args = args
        if self.before is not None:
            args = self.before(args)
        output = self.output = self.function(*args, **kwargs)
        return output if self.after is None else self.after(output)


@contextmanager
def rotary(
    model: Any, before: Change | None = None, after: Change | None = None
) -> Iterator[ByHand]:
    """Exchange `apply_rotary_pos_emb` of the model's own file."""
    file = sys.modules[type(model).__module__]
    original = file.apply_rotary_pos_emb
    file.apply_rotary_pos_emb = by_hand = ByHand(original, before, after)  # type: ignore[attr-defined]
    try:
        yield by_hand
    finally:
        file.apply_rotary_pos_emb = original  # type: ignore[attr-defined]


@contextmanager
def attention(
    model: Any, before: Change | None = None, after: Change | None = None
) -> Iterator[ByHand]:
    """Exchange the attention function that the model has been told to use."""
    name = model.config._attn_implementation
    original = AttentionInterface()[name]
    by_hand = ByHand(original, before, after)
    AttentionInterface.register(name, by_hand)
    try:
        yield by_hand
    finally:
        AttentionInterface.register(name, original)


def logits(model: Any, *prompts: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor(prompts), use_cache=False).logits
    return found


def read(*places: str, prompts: list[list[int]]) -> Request:
    recorder = Recorder()
    for place in places:
        recorder.save(recorder.read(place))
    return Request(recorder, [prompts])


def values(saved: dict[int, Any]) -> list[Any]:
    return [saved[node] for node in sorted(saved)]


def close(got: list[Any], wanted: list[Any]) -> None:
    assert_equal(dict(enumerate(got)), dict(enumerate(wanted)), EXACT)


@pytest.mark.parametrize("family", ROTARY)
def test_inputs_and_outputs_of_a_function_are_shown(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    model, place = load_oracle(family).model, f"{LLAMA.attention}.source.apply_rotary_pos_emb_0"
    with rotary(model) as seen:
        logits(model, EIFFEL, COLOSSEUM)
    with rotary(model) as seen_alone:
        logits(model, SHORT)
    leaves = [*(f"input[args.{i}]" for i in range(4)), "output[0]", "output[1]"]
    places = [f"{place}.{leaf}" for leaf in leaves]
    requests = [read(*places, prompts=[EIFFEL, COLOSSEUM]), read(*places, prompts=[SHORT])]

    both, short = run_and_save(load_engine(family), requests)

    batch = [*seen.args[2:4]]
    batch = [part.expand(2, -1, -1) for part in batch]
    close(values(both), [*seen.args[:2], *batch, *seen.output])
    close(values(short), [*seen_alone.args[:4], *seen_alone.output])


@pytest.mark.parametrize("family", ROTARY)
def test_a_written_output_of_a_function_is_what_the_model_goes_on_with(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    model, place = load_oracle(family).model, f"{LLAMA.attention}.source.apply_rotary_pos_emb_0"
    with rotary(model, after=lambda output: (output[0].flip(-1), output[1] * 0.5)):
        wanted = logits(model, EIFFEL)
    recorder = Recorder()
    query, key = (recorder.read(f"{place}.output[{i}]") for i in range(2))
    recorder.write(f"{place}.output[0]", recorder.apply("flip", query, (-1,)))
    recorder.write(f"{place}.output[1]", recorder.apply("mul", key, 0.5))
    recorder.save(recorder.read("output[logits]"))
    untouched = read("output[logits]", prompts=[EIFFEL])

    requests = [untouched, Request(recorder, [[EIFFEL]]), untouched]
    before, changed, after = run_and_save(load_engine(family), requests)

    close(values(changed), [wanted])
    for other in (before, after):
        close(values(other), [logits(model, EIFFEL)])


# Plain Gemma 2 attends by a function that no interface hands out.
@pytest.mark.parametrize("family", [family for family in ATTENDING if family != "gemma2"])
def test_the_attention_shows_and_takes_queries_keys_values_and_its_output_by_head(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    model = load_oracle(family).model
    place = f"{landmarks(family).attention}.source.attention_interface_0"

    def scaled(args: Any) -> Any:
        return (args[0], args[1], args[2], args[3] * 2, *args[4:])

    def without_a_head(output: Any) -> Any:
        changed = output[0].clone()
        changed[:, :, 2] = 0
        return (changed, *output[1:])

    with attention(model, scaled, without_a_head) as seen:
        wanted = logits(model, EIFFEL)
    recorder = Recorder()
    shown = [recorder.read(f"{place}.input[args.{i}]") for i in (1, 2, 3)]
    recorder.write(f"{place}.input[args.3]", recorder.apply("mul", shown[2], 2.0))
    output = recorder.read(f"{place}.output[0]")
    index = (slice(None), slice(None), 2)
    recorder.write(f"{place}.output[0]", recorder.apply("setitem", output, index, 0.0))
    for value in (*shown, output, recorder.read("output[logits]")):
        recorder.save(value)

    got = run_and_save(load_engine(family), [Request(recorder, [[EIFFEL]])])[0]

    close(values(got), [*seen.args[1:4], seen.output[0], wanted])


def test_a_residual_sum_is_an_operation(load_engine: LoadEngine, load_oracle: LoadOracle) -> None:
    model, place = load_oracle("llama").model, "model.layers.1.source.add_0"
    seen: list[torch.Tensor] = []

    def mixed(module: Any, args: Any) -> Any:
        seen.append(args[0])
        return (args[0].tanh(),)

    # What the sum gives goes into the norm after attention, and into the next sum.
    layer = model.model.layers[1]
    norm = layer.post_attention_layernorm.register_forward_pre_hook(mixed)
    added = layer.register_forward_hook(
        lambda module, args, output: output - seen[0] + seen[0].tanh()
    )
    wanted = logits(model, EIFFEL)
    norm.remove()
    added.remove()
    recorder = Recorder()
    total = recorder.read(f"{place}.output")
    recorder.save(total)
    recorder.write(f"{place}.output", recorder.apply("tanh", total))
    recorder.save(recorder.read("output[logits]"))

    got = run_and_save(load_engine("llama"), [Request(recorder, [[EIFFEL]])])[0]

    close(values(got), [seen[0], wanted])


# ---------------------------------------------------------------- depth, steps, failures


def test_a_sweep_that_forks_and_leaves_inside_of_layers_is_what_each_is_alone(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    engine, oracle = load_engine("llama"), load_oracle("llama")
    requests = []
    for layer in range(3):
        inside = f"model.layers.{layer}.self_attn.source"
        recorder = Recorder()
        query = recorder.read(f"{inside}.apply_rotary_pos_emb_0.output[0]")
        recorder.write(f"{inside}.apply_rotary_pos_emb_0.output[0]", recorder.apply("neg", query))
        recorder.save(recorder.read(f"{inside}.attention_interface_0.output[0]"))
        recorder.save(recorder.read(f"model.layers.{layer}.source.add_1.input[args.1]"))
        if layer == 1:
            recorder.save(recorder.read("source.self_lm_head_0.input[args.0]"))
            recorder.save(recorder.read("output[logits]"))
        requests.append(Request(recorder, [[EIFFEL]], sharing=1))

    together = run_and_save(engine, requests)

    for request, got in zip(requests, together, strict=True):
        assert_equal(got, request.on(oracle), EXACT)


def test_the_loop_over_the_layers_shows_what_flows_but_not_what_is_laid_out_later(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    engine, oracle = load_engine("llama"), load_oracle("llama")
    recorder = Recorder()
    flow = point("model.source.decoder_layer_0.input[args.0]", call=2)
    recorder.write(flow, recorder.apply("tanh", recorder.read(flow)))
    recorder.save(recorder.read(point("model.source.decoder_layer_0.output", call=2)))
    changed = Request(recorder, [[EIFFEL]], sharing=1)
    short = read("model.layers.0.output", prompts=[COLOSSEUM])
    requests = [short, changed, read("output[logits]", prompts=[EIFFEL])]

    for request, got in zip(requests, run_and_save(engine, requests), strict=True):
        assert_equal(got, request.on(oracle), EXACT)

    stale = point("model.source.decoder_layer_0.input[kwargs.position_embeddings.0]", call=2)
    recorder = Recorder()
    recorder.save(recorder.read(stale))
    (result,), _ = run(engine, [Request(recorder, [[EIFFEL]])])
    assert result.fault is not None
    assert "the loop over the layers holds it as it was at first" in result.fault.message
    assert result.fault.source is not None
    assert result.fault.source.line == 1


def test_an_unknown_operation_is_refused_with_what_was_probably_meant(
    load_engine: LoadEngine,
) -> None:
    recorder = Recorder()
    recorder.save(recorder.read("model.layers.1.self_attn.source.apply_rotary_0.output[0]"))

    (result,), _ = run(load_engine("llama"), [Request(recorder, [[EIFFEL]])])

    assert result.fault is not None
    assert "did you mean 'apply_rotary_pos_emb_0'?" in result.fault.message


def test_who_waits_for_an_operation_that_did_not_run_is_told_so(
    load_engine: LoadEngine, load_oracle: LoadOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, place = load_engine("llama"), "model.layers.1.self_attn.source.reshape_0.output"
    attending = engine._model.model.get_submodule("model.layers.1.self_attn")
    original = attending.forward
    # As if the forward had gone another way than it did at load.
    monkeypatch.setattr(attending, "forward", lambda *args, **kwargs: original(*args, **kwargs))
    monkeypatch.setattr(
        "ndif_actor.engine.interleaver.watching", lambda *args: recording_moments(attending, {})
    )
    neighbour = read("output[logits]", prompts=[SHORT])

    results, _ = run(engine, [read(place, prompts=[EIFFEL]), neighbour])

    assert results[0].fault is not None
    assert "the model did not run it in this forward" in results[0].fault.message
    assert results[1].fault is None


def test_a_pass_leaves_the_model_as_it_was(load_engine: LoadEngine) -> None:
    engine = load_engine("llama")
    run_and_save(engine, [read("model.layers.1.mlp.source.mul_0.output", prompts=[EIFFEL])])

    for _, module in engine._model.model.named_modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_every_packable_family_offers_operations_in_its_layers(load_engine: LoadEngine) -> None:
    for family in ATTENDING:
        sites = load_engine(family).blueprint.table.sites
        attention = landmarks(family).attention
        inside = {p.operation for p in sites if p.path == attention}
        assert {"attention_interface_0", "reshape_0"} <= inside
        assert HookPoint(landmarks(family).mlp, "output") in sites


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("family", ("llama", "gpt2", "qwen3_moe"))
def test_gradients_reach_operations_and_are_written_there(
    family: str, load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    engine, oracle = load_engine(family), load_oracle(family)
    place = f"{landmarks(family).attention}.source.attention_interface_0"
    recorder = Recorder()
    key = recorder.read(f"{place}.input[args.2]")
    output = recorder.read(f"{place}.output[0]")
    recorder.write(f"{place}.output[0]", recorder.apply("tanh", output))
    loss = recorder.apply("sum", recorder.apply("sin", recorder.read("output[logits]")))
    backward = recorder.backward(loss)
    arrived = recorder.gradient(backward, output)
    doubled = recorder.apply("mul", arrived, 2.0)
    recorder.write_gradient(backward, output, doubled)
    for value in (arrived, recorder.gradient(backward, key)):
        recorder.save(value)
    neighbour = read("output[logits]", prompts=[SHORT])

    requests = [Request(recorder, [[EIFFEL, COLOSSEUM]]), neighbour]

    for request, got in zip(requests, run_and_save(engine, requests), strict=True):
        assert_equal(got, request.on(oracle), EXACT)
