"""What is refused before it may queue, in which words, and what admitted requests become."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ndif_actor.coordinator.admission import Admission, Prepared, RequestLimits
from ndif_actor.coordinator.capacity import CacheSize, cache_size
from ndif_actor.coordinator.choice import ModelChoice
from ndif_actor.coordinator.outlook import Outlook
from ndif_actor.errors import RequestError
from ndif_actor.messages import Loaded
from ndif_client.wire.graph import (
    Chat,
    Graph,
    HookPoint,
    Invoke,
    Message,
    Node,
    ReadHook,
    Ref,
    Save,
    Steps,
    WriteHook,
)
from ndif_client.wire.messages import Decoding, Fault, Submission, TraceRequest
from tests.conftest import MakeModel

HIDDEN = HookPoint("model.layers.1", "output")


@pytest.fixture
def folder(model_folder: MakeModel) -> Path:
    return model_folder("llama")


@pytest.fixture
async def admission(folder: Path) -> AsyncIterator[Admission]:
    made = Admission("m", RequestLimits(value_bytes=1 << 30, saved_bytes=1 << 30))
    await made.load(ModelChoice(str(folder), "float32", "cpu"), 1)
    made.set_cache(CacheSize(20, 4, ""))
    yield made
    await made.close()


def request(
    *prompts: str | list[int] | Chat,
    decoding: Decoding | None = None,
    graph: Graph | None = None,
    numerics: str = "fast",
) -> TraceRequest:
    return TraceRequest(
        id="abcdefgh",
        model="m",
        invokes=[Invoke([prompt]) for prompt in prompts],
        graph=graph or Graph(),
        decoding=decoding,
        numerics="solo" if numerics == "solo" else "fast",
    )


async def admit(admission: Admission, made: TraceRequest, user: str = "ann") -> Prepared:
    (answer,) = await admission.admit(Submission(requests=[made]), [], user, Outlook())
    assert isinstance(answer, Prepared), answer
    return answer


async def fault(admission: Admission, made: TraceRequest) -> Fault:
    (answer,) = await admission.admit(Submission(requests=[made]), [], "ann", Outlook())
    assert isinstance(answer, Fault)
    return answer


async def test_a_generation_is_admitted_with_ids_for_everything(admission: Admission) -> None:
    decoding = Decoding(max_new_tokens=5, stop=["!"], bad_words=["a", [7]])

    prepared = await admit(admission, request("abc", [5, 6], decoding=decoding))

    found = prepared.group.decoding
    assert found is not None
    assert (found.eos, found.stop) == ([1], [])
    assert [7] in found.bad_words
    assert not any(isinstance(word, str) for word in found.bad_words)
    assert len(prepared.completions) == 2
    continuation = prepared.ticket.continuation
    assert continuation is not None
    assert [len(ids) for ids in continuation.prompts] == [3, 2]
    assert prepared.ticket.tokens == 5


@pytest.mark.parametrize(
    ("decoding", "kind", "words"),
    [
        (Decoding(max_new_tokens=100), "limit", "100 for each make 103 tokens"),
        (Decoding(max_new_tokens=1 << 20), "limit", "the model takes"),
        (Decoding(max_new_tokens=2, min_new_tokens=3), "graph", "min_new_tokens=3"),
        (Decoding(max_new_tokens=2, eos=[10_000]), "graph", "eos has token id 10000"),
        (Decoding(max_new_tokens=2, bad_words=[[10_000]]), "graph", "bad_words has token id"),
        (Decoding(max_new_tokens=2, logit_bias={10_000: 1.0}), "graph", "logit_bias has token id"),
        (Decoding(max_new_tokens=2, logit_bias={1: float("nan")}), "graph", "is nan"),
    ],
)
async def test_a_generation_that_cannot_run_is_refused_with_the_reason(
    admission: Admission, decoding: Decoding, kind: str, words: str
) -> None:
    refusal = await fault(admission, request("abc", decoding=decoding))

    assert refusal.kind == kind
    assert words in refusal.message


async def test_a_model_without_cache_refuses_generations_alone(admission: Admission) -> None:
    admission.set_cache(cache_size([loaded(5), loaded(0)], None))

    refusal = await fault(admission, request("abc", decoding=Decoding(max_new_tokens=2)))

    assert refusal.message.startswith("generation needs a KV cache")
    await admit(admission, request("abc"))


def loaded(pages: int) -> Loaded:
    return Loaded(
        rank=0, device="cpu", load_s=0, parameter_bytes=0, cache_pages=pages, page_tokens=16
    )


async def test_a_model_without_an_encoder_takes_no_decoder_prompts(admission: Admission) -> None:
    made = TraceRequest(
        id="abcdefgh", model="m", invokes=[Invoke(["x"], ["y"])], graph=Graph(), decoding=None
    )

    refusal = await fault(admission, made)

    assert refusal.kind == "graph"
    assert refusal.message == "decoder=... needs a model with an encoder; LlamaForCausalLM has none"


def test_the_cache_is_as_large_as_that_of_the_rank_with_the_least() -> None:
    assert cache_size([loaded(5), loaded(3)], None) == CacheSize(3, 16, "")
    assert "lone" in cache_size([loaded(5)], "a lone wolf").missing


async def test_a_conversation_needs_a_template(admission: Admission) -> None:
    refusal = await fault(admission, request(Chat([Message("user", "hi")])))

    assert refusal.kind == "graph"
    assert "no chat template" in refusal.message


def graph_of(node: Node, steps: Steps) -> Graph:
    return Graph(
        nodes=[node, Save(Ref(0))][: 1 + isinstance(node, ReadHook)],
        steps=[steps],
        during=[0, 0][: 1 + isinstance(node, ReadHook)],
    )


@pytest.mark.parametrize(
    ("steps", "chunkable"), [(Steps(0, 1), False), (Steps(), False), (Steps(1), True)]
)
async def test_a_prompt_that_is_looked_at_is_fed_whole(
    admission: Admission, steps: Steps, chunkable: bool
) -> None:
    graph = graph_of(ReadHook(HIDDEN), steps)

    found = await admit(admission, request("abc", graph=graph, decoding=Decoding(max_new_tokens=5)))

    continuation = found.ticket.continuation
    assert continuation is not None
    assert continuation.chunkable == continuation.takes_cached == chunkable
    assert continuation.registers_prompt
    assert continuation.registers_rest


@pytest.mark.parametrize(
    ("steps", "prompt"), [(Steps(0, 1), False), (Steps(), False), (Steps(1), True)]
)
async def test_what_an_intervention_has_changed_is_not_left_to_others(
    admission: Admission, steps: Steps, prompt: bool
) -> None:
    graph = graph_of(WriteHook(HIDDEN, 0.0), steps)

    found = await admit(admission, request("abc", graph=graph, decoding=Decoding(max_new_tokens=5)))

    continuation = found.ticket.continuation
    assert continuation is not None
    assert (continuation.registers_prompt, continuation.registers_rest) == (prompt, False)


async def test_solo_numbers_do_not_come_from_what_others_have_computed(
    admission: Admission,
) -> None:
    found = await admit(
        admission, request("abc", numerics="solo", decoding=Decoding(max_new_tokens=5))
    )

    assert found.ticket.alone
    assert found.ticket.continuation is not None
    assert not found.ticket.continuation.takes_cached


async def test_users_share_nothing_unless_the_operator_says_so(
    admission: Admission, folder: Path
) -> None:
    made = request("abc")
    ann, bob, again = [await admit(admission, made, user) for user in ("ann", "bob", "ann")]

    assert ann.group.sharing == again.group.sharing != bob.group.sharing


async def test_an_explanation_prices_without_running(admission: Admission) -> None:
    (found,) = await admission.explain(Submission(requests=[request("abc")]), [], "ann", Outlook())
    assert (found.id, found.tokens) == ("abcdefgh", 3)

    with pytest.raises(RequestError, match="has no tokens"):
        await admission.explain(Submission(requests=[request([])]), [], "ann", Outlook())
