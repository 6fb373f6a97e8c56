"""Edits: recorded once, applied to every later trace, stored as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ndif_client import Edit, blocking, errors
from tests.conftest import MakeModel
from tests.integration.server.harness import running

PROMPT, OTHER = "The Eiffel Tower is in", "A colosseum stands there"
VECTOR = torch.linspace(-2, 2, 48, dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(model_folder: MakeModel) -> Path:
    return model_folder("llama", torch.float64)


@pytest.fixture(scope="module")
def session(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running(folder, log, "--dtype", "float64") as server, blocking.connect(server.url) as own:
        yield own


class Local:
    """transformers with the edit's hooks."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model.model.layers[1].register_forward_hook(lambda m, a, output: output + VECTOR)
        self.model.model.layers[2].mlp.register_forward_hook(lambda m, a, output: output * 0)

    def logits(self, prompt: str) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.model(torch.tensor([self.ids(prompt)])).logits
        return found

    def ids(self, prompt: str) -> list[int]:
        return list(self.tokenizer(prompt).input_ids)


def record(session: Any, name: str = "steer") -> Edit:
    with session.edit(name) as edit:
        session.model.layers[1].output += VECTOR
        session.model.layers[2].mlp.output *= 0
    found: Edit = edit
    return found


def logits_of(session: Any, *prompts: str) -> list[torch.Tensor]:
    with session.trace() as trace:
        found = []
        for prompt in prompts:
            with trace.invoke(prompt):
                found.append(session.model.lm_head.output)
        trace.found = found
    return list(trace.result.found)


def test_an_edit_applies_to_each_later_trace_until_it_is_removed(
    session: Any, folder: Path
) -> None:
    plain = logits_of(session, PROMPT)
    session.edits.add(record(session))
    try:
        edited = logits_of(session, PROMPT, OTHER)
        with session.generate(PROMPT, max_new_tokens=4) as gen:
            pass
    finally:
        session.edits.remove("steer")
    local = Local(folder)

    for prompt, own in zip((PROMPT, OTHER), edited, strict=True):
        torch.testing.assert_close(own, local.logits(prompt), rtol=0, atol=1e-9)
    ids = torch.tensor([local.ids(PROMPT)])
    wanted = local.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert gen.result.new_ids == wanted.tolist()
    assert torch.equal(logits_of(session, PROMPT)[0], plain[0])


def test_a_copy_of_the_handle_is_edited_alone(session: Any, folder: Path) -> None:
    edited = session.with_edits(record(session))

    torch.testing.assert_close(
        logits_of(edited, PROMPT)[0], Local(folder).logits(PROMPT), rtol=0, atol=1e-9
    )
    edited.close()
    assert len(session.edits) == 0
    assert not torch.allclose(logits_of(session, PROMPT)[0], Local(folder).logits(PROMPT))


def test_a_trace_sees_the_edit_and_may_go_on_from_there(session: Any) -> None:
    edited = session.with_edits(record(session))
    with edited.trace(PROMPT) as trace:
        trace.mlp = edited.model.layers[2].mlp.output
        edited.model.layers[2].mlp.output = trace.mlp + 1
        trace.later = edited.model.layers[2].mlp.output
    assert bool((trace.result.mlp == 0).all()) and bool((trace.result.later == 1).all())


def test_an_edit_travels_as_a_file(session: Any, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "steer.ndif-edit"
    with session.edit("conditional") as edit:
        hidden = session.model.layers[1].output
        hidden += VECTOR
    edit.save(file)

    loaded = Edit.load(file)

    assert loaded.name == "conditional" and "conditional" in repr(loaded)
    assert torch.equal(
        logits_of(session.with_edits(loaded), PROMPT)[0],
        logits_of(session.with_edits(edit), PROMPT)[0],
    )
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(errors.NdifError, match="holds no edit"):
        Edit.load(file)


def test_what_an_edit_can_not_have_is_refused(session: Any) -> None:
    model = session.model
    with pytest.raises(errors.GraphError, match="nothing can be saved"), session.edit("a"):
        model.layers[1].output.save()
    with pytest.raises(errors.GraphError, match="changes nothing"), session.edit("a"):
        _ = model.layers[1].output
    with pytest.raises(errors.GraphError, match="no gradients"), session.edit("a"):
        model.lm_head.output.sum().backward()
    with pytest.raises(errors.GraphError, match="no recorded edit"):
        session.edits.add("steer")
    with pytest.raises(KeyError):
        session.edits.remove("steer")


def test_a_mistake_in_an_edit_names_the_line_it_was_written_in(session: Any) -> None:
    with session.edit("wrong") as edit:
        session.model.layers[1].output = session.model.layers[1].output[:, :, :7]
    with (
        pytest.raises(errors.GraphError, match=r"layers\[1\].output\[:, :, :7\]"),
        session.with_edits(edit).trace(PROMPT),
    ):
        session.model.lm_head.output.save()
