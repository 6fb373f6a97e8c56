"""Standard names, skipping, caches and scans through a real server, on two families."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ndif_client import blocking, errors
from tests.conftest import MakeModel
from tests.integration.server.harness import running
from tests.requests import landmarks

PROMPT, OTHER = "The Eiffel Tower is in", "A colosseum stands there"


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, model_folder: MakeModel) -> Path:
    return model_folder(family, torch.float64)


@pytest.fixture(scope="module")
def session(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running(folder, log, "--dtype", "float64") as server, blocking.connect(server.url) as own:
        yield own


def test_one_experiment_runs_on_every_family(session: Any, family: str) -> None:
    model, marks = session.model, landmarks(family)
    with session.together():
        with session.trace(PROMPT) as standard:
            layer = model.layers[1]
            layer.attn.output[0][:] = 0
            standard.mlp = layer.mlp.output
            layer.resid[:, 0] += 1
            standard.before = model.layers[2].resid_pre
            standard.lens = model.unembed(model.norm(layer.resid))
            standard.embedded = model.embed.output
        with session.trace(PROMPT) as raw:
            block = model[marks.block]
            model[marks.attention].output[0][:] = 0
            raw.mlp = model[marks.mlp].output
            block.output[:, 0] += 1
            raw.before = model[marks.next_block].input
            raw.lens = model.lm_head(model[marks.norm](block.output))
            raw.embedded = model.embed.output

    for name, value in standard.result.items():
        torch.testing.assert_close(value, raw.result[name], rtol=0, atol=1e-10, msg=name)
    assert "layers" in dir(model) and "resid" in dir(model.layers[0])
    assert family == "gpt2" or "also: embed = model.embed_tokens" in repr(model)


def test_a_skipped_module_gives_the_value_for_this_user_only(session: Any, family: str) -> None:
    model = session.model
    with session.together():
        with session.trace(PROMPT) as skipping:
            model.layers[1].mlp.skip(model.layers[1].resid_pre * 0)
            skipping.logits = model.unembed.output
        with session.trace(PROMPT) as writing:
            model.layers[1].mlp.output = 0
            writing.logits = model.unembed.output
        with session.trace(PROMPT) as neighbour:
            neighbour.logits = model.unembed.output

    assert torch.equal(skipping.result.logits, writing.result.logits)
    assert not torch.allclose(skipping.result.logits, neighbour.result.logits)
    inner = next(iter(model.layers[1].mlp._children))
    with pytest.raises(errors.GraphError, match="never reached"), session.trace(PROMPT):
        model.layers[1].mlp.skip(model.layers[1].resid_pre)
        model.layers[1].mlp[inner].output.save()
    for earlier in (model.layers[1].mlp[inner], model.layers[1].mlp):
        with pytest.raises(errors.GraphError, match="never be reached"), session.trace(PROMPT):
            earlier.output.save()
            model.layers[1].mlp.skip(model.layers[1].resid_pre)
    with pytest.raises(errors.GraphError, match="as many"), session.trace(PROMPT):
        model.layers[1].mlp.skip((model.layers[1].resid_pre, model.layers[1].resid_pre))


def test_a_cache_holds_what_the_model_has_computed(session: Any, family: str) -> None:
    model, marks = session.model, landmarks(family)
    with session.trace() as trace:
        with trace.invoke(PROMPT):
            cache = trace.cache()
            model.layers[0].resid[:] = 1
        with trace.invoke(OTHER):
            mlps = trace.cache(f"{marks.block[:-1]}*.mlp", inputs=True, name="mlps")
            trace.own = model.layers[1].mlp.output
            trace.given = model.layers[1].mlp.input

    assert list(cache) == [f"{marks.block[:-1]}{number}" for number in range(3)]
    assert bool((cache[model.layers[0]] == 1).all())
    assert torch.equal(mlps[marks.mlp], trace.result.own)
    assert torch.equal(mlps.inputs[marks.mlp], trace.result.given)
    assert trace.result.cache[marks.block].shape == cache[marks.block].shape
    with session.generate(PROMPT, max_new_tokens=3) as gen, gen.all():
        steps = gen.cache([model.layers[1].mlp])
    assert [value.shape[1] for value in steps[marks.mlp]][1:] == [1, 1]
    with pytest.raises(errors.GraphError, match="matches"), session.trace(PROMPT) as trace:
        trace.cache("model.layer.*.mpl")


def test_a_scan_tells_all_shapes_and_runs_nothing(session: Any) -> None:
    model = session.model
    with session.trace(PROMPT) as trace:
        hidden = model.layers[1].resid
        best = model.unembed.output.topk(3)
        trace.norms = [hidden.norm(dim=-1), hidden.float().mean()]
        scan = trace.scan()
    tokens = trace.result.norms[0].shape[1]

    assert scan.shape_of(hidden) == (1, tokens, 48)
    assert scan.dtype_of(hidden) == "float64"
    assert scan.shape_of(best) == ((1, tokens, 3), (1, tokens, 3))
    assert scan["norms"] == [(1, tokens), ()]
    assert scan.dtype_of(best) == ("float64", "int64")
