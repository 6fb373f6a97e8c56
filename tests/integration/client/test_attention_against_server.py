"""The inside of attentions through the client, against transformers' own eager attention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ndif_client import blocking, errors
from tests.conftest import MakeModel
from tests.integration.server.harness import running

PROMPT = "The Eiffel Tower is in"


@pytest.fixture(scope="module")
def folder(model_folder: MakeModel) -> Path:
    return model_folder("llama", torch.float64)


@pytest.fixture(scope="module")
def session(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running(folder, log, "--dtype", "float64") as server, blocking.connect(server.url) as own:
        yield own


def test_patterns_equal_those_of_transformers(session: Any, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
    wanted = model(torch.tensor([ids]), output_attentions=True).attentions

    with session.trace(PROMPT) as trace:
        attentions = [layer.self_attn for layer in session.model.model.layers]
        trace.patterns = [attention.pattern for attention in attentions]
        trace.head = attentions[1].heads[3].pattern

    # transformers rounds the softmax to float32
    for own, pattern in zip(trace.result.patterns, wanted, strict=True):
        torch.testing.assert_close(own, pattern, rtol=0, atol=1e-6)
    assert torch.equal(trace.result.head, trace.result.patterns[1][:, 3])


def test_heads_are_ablated_alike_by_result_and_before_the_projection(session: Any) -> None:
    attention = session.model.model.layers[1].self_attn
    with session.together():
        with session.trace(PROMPT) as by_head:
            attention.heads[2].result = 0
            by_head.logits = session.model.lm_head.output
        with session.trace(PROMPT) as by_index:
            attention.o_proj.input[..., 24:36] = 0
            by_index.logits = session.model.lm_head.output
        with session.trace(PROMPT) as several:
            attention.heads[[1, 2]].result *= 0
            several.first = attention.o_proj.input[..., 12:36]
            several.second = attention.o_proj.input[..., 36:]

    torch.testing.assert_close(by_head.result.logits, by_index.result.logits, rtol=0, atol=1e-12)
    assert several.result.first.abs().sum() == 0
    assert several.result.second.abs().sum() > 0


def test_a_head_is_ablated_alike_by_pattern_and_result_at_every_step(session: Any) -> None:
    def generated(port: str) -> Any:
        attention = session.model.model.layers[1].self_attn
        with session.generate(PROMPT, max_new_tokens=4) as generation, generation.all():
            pattern = attention.pattern
            getattr(attention.heads[3], port)[:] = 0
            generation.pattern = pattern
            generation.logits = session.model.lm_head.output[:, -1]
        return generation.result

    by_pattern, by_result = generated("pattern"), generated("result")

    tokens = len(session.tokenize(PROMPT).ids)
    keys = [pattern.shape[-2:] for pattern in by_result.pattern]
    assert keys == [(tokens, tokens), (1, tokens + 1), (1, tokens + 2), (1, tokens + 3)]
    for pattern in by_result.pattern:
        torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))
    for own, other in zip(by_pattern.logits, by_result.logits, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10)


def test_query_heads_know_the_keys_they_share(session: Any) -> None:
    attention = session.model.model.layers[1].self_attn
    with session.trace(PROMPT) as trace:
        trace.whole = attention.key
        trace.shared = [attention.heads[head].key for head in range(4)]
        trace.last = attention.heads[2:].value
        trace.all_values = attention.value

    result = trace.result
    assert list(result.whole.shape[:2]) == [1, 2]
    for head, key in enumerate(result.shared):
        assert torch.equal(key, result.whole[:, head // 2])
    assert torch.equal(result.last, result.all_values[:, 1:])
    assert len(attention.heads) == 4


def test_mistakes_with_heads_are_refused(session: Any) -> None:
    model = session.model
    with pytest.raises(errors.GraphError, match="4 heads"), session.trace(PROMPT):
        model.model.layers[1].self_attn.heads[4].query.save()
    with pytest.raises(errors.GraphError, match="no 'heads'"), session.trace(PROMPT):
        model.model.layers[1].mlp.heads[0].save()
    with pytest.raises(errors.GraphError, match="no 'patern'"), session.trace(PROMPT):
        model.model.layers[1].self_attn.heads[0].patern.save()
