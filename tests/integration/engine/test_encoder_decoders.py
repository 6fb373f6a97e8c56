"""Models with an encoder and a decoder, each with prompts of its own, against plain hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from ndif_actor.engine.engine import Engine
from ndif_client.wire.graph import HookPoint
from tests.conftest import LoadEngine, MakeModel
from tests.requests import EXACT, Recorder, Request, assert_equal, point, run, run_and_save

IDS, OTHER = [5, 17, 99, 250, 3, 41, 8], [200, 100, 50, 7, 7, 12, 4]
START, TARGET = [0, 71, 33, 9], [0, 8, 150, 21]

every_family = pytest.mark.parametrize("family", ["t5", "bart"])

#: An output in the encoder, and one in the decoder.
INSIDE = {
    "t5": ("encoder.block.1.output[0]", "decoder.block.0.layer.1.EncDecAttention.output[0]"),
    "bart": ("model.encoder.layers.0.fc1.output", "model.decoder.layers.0.encoder_attn.output[0]"),
}


class Plain:
    """transformers, with hooks set by hand."""

    def __init__(self, folder: Any) -> None:
        self.model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.seen: dict[str, torch.Tensor] = {}

    def logits(self, ids: Sequence[int], decoder: Sequence[int]) -> torch.Tensor:
        """Run one prompt, and note the tensor that each module returns first."""
        self.seen = {}
        logits: torch.Tensor = self.model(
            input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([decoder])
        ).logits
        return logits

    @contextmanager
    def watching(self) -> Iterator[None]:
        def hook(path: str) -> Any:
            def look(module: Any, args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) else output
                if isinstance(first, torch.Tensor):
                    self.seen.setdefault(path, first.clone())

            return look

        handles = [m.register_forward_hook(hook(path)) for path, m in self.model.named_modules()]
        yield
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="session")
def load_plain(model_folder: MakeModel) -> Any:
    """A function from family to plain transformers with the same weights."""
    return cache(lambda family: Plain(model_folder(family, torch.float64)))


def read_outputs(engine: Engine) -> dict[str, HookPoint]:
    return {
        p.path: p
        for p in engine.blueprint.table.sites
        if p.port == "output" and p.leaf in ("", "0") and not p.operation and not p.call
    }


@every_family
def test_what_modules_of_both_sides_return_is_what_plain_hooks_see(
    family: str, load_engine: LoadEngine, load_plain: Any
) -> None:
    engine, plain = load_engine(family), load_plain(family)
    points = read_outputs(engine)
    recorder = Recorder()
    saves = {path: recorder.save(recorder.read(hook)) for path, hook in points.items()}

    (values,) = run_and_save(engine, [Request(recorder, [[IDS]], decoder=[[START]])], "dense")

    with plain.watching(), torch.no_grad():
        plain.logits(IDS, START)
    assert any("decoder" in path for path in points)
    assert len(points) > 50
    for path in points:
        assert_equal({0: values[saves[path].node]}, {0: plain.seen[path]}, EXACT)


@every_family
def test_a_write_on_either_side_changes_the_model_as_a_plain_hook_would(
    family: str, load_engine: LoadEngine, load_plain: Any
) -> None:
    for name in INSIDE[family]:
        hook = point(name)
        recorder = Recorder()
        recorder.write(hook, recorder.apply("mul", recorder.read(hook), 0.3))
        logits = recorder.save(recorder.read("output[logits]"))
        request = Request(recorder, [[IDS]], decoder=[[START]])

        (values,) = run_and_save(load_engine(family), [request], "dense")

        def scale(module: Any, args: Any, output: Any) -> Any:
            return (output[0] * 0.3, *output[1:]) if isinstance(output, tuple) else output * 0.3

        plain = load_plain(family)
        handle = plain.model.get_submodule(hook.path).register_forward_hook(scale)
        with torch.no_grad():
            wanted = plain.logits(IDS, START)
        handle.remove()
        assert_equal({0: values[logits.node]}, {0: wanted}, EXACT)


@every_family
def test_values_cross_from_one_invoke_to_another(
    family: str, load_engine: LoadEngine, load_plain: Any
) -> None:
    hook = point(INSIDE[family][0])
    recorder = Recorder()
    recorder.write(hook, recorder.read(hook, 0), 1)
    clean = recorder.save(recorder.read("output[logits]", 0))
    patched = recorder.save(recorder.read("output[logits]", 1))
    request = Request(recorder, [[IDS], [OTHER]], decoder=[[START], [TARGET]])

    (values,) = run_and_save(load_engine(family), [request], "dense")

    plain = load_plain(family)
    with plain.watching(), torch.no_grad():
        wanted = plain.logits(IDS, START)
    source = plain.seen[hook.path]

    def patch(module: Any, args: Any, output: Any) -> Any:
        return (source, *output[1:]) if isinstance(output, tuple) else source

    handle = plain.model.get_submodule(hook.path).register_forward_hook(patch)
    with torch.no_grad():
        moved = plain.logits(OTHER, TARGET)
    handle.remove()
    assert_equal({0: values[clean.node], 1: values[patched.node]}, {0: wanted, 1: moved}, EXACT)


@every_family
def test_gradients_flow_from_the_decoder_into_the_encoder(
    family: str, load_engine: LoadEngine, load_plain: Any
) -> None:
    hook = point(INSIDE[family][0])
    recorder = Recorder()
    value = recorder.read(hook)
    loss = recorder.apply("sum", recorder.apply("sin", recorder.read("output[logits]")))
    gradient = recorder.save(recorder.gradient(recorder.backward(loss), value))
    request = Request(recorder, [[IDS]], decoder=[[START]])

    (values,) = run_and_save(load_engine(family), [request], "dense")

    plain, kept = load_plain(family), []

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = plain.model.get_submodule(hook.path).register_forward_hook(keep)
    wanted = torch.autograd.grad(plain.logits(IDS, START).sin().sum(), kept)
    handle.remove()
    assert_equal({0: values[gradient.node]}, {0: wanted[0]}, EXACT)


def test_prompts_of_unequal_length_are_padded_on_each_side_for_itself(
    load_engine: LoadEngine, load_plain: Any
) -> None:
    prompts, targets = [IDS, [9, 4], OTHER[:5]], [START[:1], TARGET, START[:3]]
    recorder = Recorder()
    hidden = recorder.save(recorder.read("encoder.block.2.output[0]"))
    logits = recorder.save(recorder.read("output[logits]"))

    (values,) = run_and_save(
        load_engine("t5"), [Request(recorder, [prompts], decoder=[targets])], "dense"
    )

    assert values[hidden.node].shape == (3, 7, 48)
    assert values[logits.node].shape == (3, 4, 300)
    plain = load_plain("t5")
    for row, (ids, target) in enumerate(zip(prompts, targets, strict=True)):
        with plain.watching(), torch.no_grad():
            wanted = plain.logits(ids, target)[0]
        own = values[logits.node][row]
        assert_equal({0: own[-len(target) :]}, {0: wanted}, EXACT)
        assert not own[: -len(target)].any()
        deep = values[hidden.node][row, -len(ids) :]
        assert_equal({0: deep}, {0: plain.seen["encoder.block.2"][0]}, EXACT)


def test_where_padding_would_change_a_prompt_unequal_lengths_are_refused_on_both_sides(
    load_engine: LoadEngine,
) -> None:
    recorder = Recorder()
    recorder.save(recorder.read("output[logits]"))

    for prompts, targets in (([IDS, [9]], [START, START]), ([IDS, IDS], [START, [0]])):
        request = Request(recorder, [prompts], decoder=[targets])
        (result,), _ = run(load_engine("bart"), [request], "dense")

        assert result.fault is not None
        assert "must have the same number of tokens" in result.fault.message
