"""The oracle itself, held against hooks written out by hand as a researcher would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.conftest import LoadEngine, LoadOracle
from tests.integration.engine import experiments
from tests.integration.engine.experiments import COLOSSEUM, EIFFEL
from tests.requests import EXACT, LLAMA, Request, assert_equal, run_and_save


@contextmanager
def hook(module: torch.nn.Module, function: Any, *, before: bool = False) -> Iterator[None]:
    register = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = register(function)
    try:
        yield
    finally:
        handle.remove()


def logits(model: PreTrainedModel, *prompts: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor(prompts), use_cache=False).logits
    return found


def check(
    request: Request, wanted: list[Any], load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    """Both the oracle and the engine must save the wanted values, in order."""
    oracle = request.on(load_oracle("llama"))
    expected = dict(zip(sorted(oracle), wanted, strict=True))
    assert_equal(oracle, expected, EXACT)
    assert_equal(run_and_save(load_engine("llama"), [request])[0], expected, EXACT)


def test_save(load_engine: LoadEngine, load_oracle: LoadOracle) -> None:
    model = load_oracle("llama").model
    seen = []

    with (
        hook(model.model.layers[1].self_attn, lambda m, a, output: seen.append(output[0])),
        hook(model.model.layers[1], lambda m, a, output: seen.append(output)),
    ):
        logits(model, EIFFEL)

    check(experiments.save(LLAMA), seen[::-1], load_engine, load_oracle)


def test_replace(load_engine: LoadEngine, load_oracle: LoadOracle) -> None:
    model = load_oracle("llama").model
    seen = []

    def tanh(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output)
        return output.tanh()

    with hook(model.model.layers[1].mlp, tanh):
        wanted = logits(model, EIFFEL)

    check(experiments.replace(LLAMA), [wanted, *seen], load_engine, load_oracle)


def test_write_a_slice(load_engine: LoadEngine, load_oracle: LoadOracle) -> None:
    model = load_oracle("llama").model

    def ablate(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -1] = 0
        return output

    with hook(model.model.layers[1].mlp, ablate):
        wanted = logits(model, EIFFEL)

    check(experiments.write_a_slice(LLAMA), [wanted], load_engine, load_oracle)


def test_write_an_input(load_engine: LoadEngine, load_oracle: LoadOracle) -> None:
    model = load_oracle("llama").model
    seen = []

    with (
        hook(model.model.layers[1], lambda m, args: (args[0].flip(2), *args[1:]), before=True),
        hook(model.model.layers[1], lambda m, a, output: seen.append(output)),
    ):
        wanted = logits(model, EIFFEL)

    check(experiments.write_an_input(LLAMA), [*seen, wanted], load_engine, load_oracle)


def test_ablate_a_head(load_engine: LoadEngine, load_oracle: LoadOracle) -> None:
    model = load_oracle("llama").model

    def ablate(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        heads = args[0].clone()
        heads[:, :, 12:24] = 0
        return (heads,)

    with hook(model.model.layers[1].self_attn.o_proj, ablate, before=True):
        wanted = logits(model, EIFFEL)

    check(experiments.ablate_a_head(LLAMA), [wanted], load_engine, load_oracle)


def test_logit_lens(load_engine: LoadEngine, load_oracle: LoadOracle) -> None:
    model = load_oracle("llama").model
    seen = []

    with hook(model.model.layers[1], lambda m, a, output: seen.append(output)):
        logits(model, EIFFEL)
    with torch.no_grad():
        lens = model.lm_head(model.model.norm(seen[0]))

    wanted = [lens, tuple(lens[:, -1].topk(5))]
    check(experiments.logit_lens(LLAMA), wanted, load_engine, load_oracle)


def test_patch_between_prompts(load_engine: LoadEngine, load_oracle: LoadOracle) -> None:
    model = load_oracle("llama").model
    seen: list[torch.Tensor] = []

    def patch(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, 3] = seen[0][:, 3]
        return output

    with hook(model.model.layers[1], lambda m, a, output: seen.append(output)):
        clean = logits(model, EIFFEL)
    with hook(model.model.layers[1], patch):
        patched = logits(model, COLOSSEUM)

    check(experiments.patch_between_prompts(LLAMA), [clean, patched], load_engine, load_oracle)
