"""How a generation goes on: its settings as token ids, and what its graph allows the scheduler."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from msgspec.structs import replace

from ndif_actor.coordinator.events import Continuation
from ndif_actor.coordinator.screening import refused
from ndif_client.wire.graph import Graph, ReadHook, Steps, WriteHook
from ndif_client.wire.messages import Decoding

if TYPE_CHECKING:
    from ndif_actor.engine.tokens import Tokenizer


def resolve(decoding: Decoding, tokenizer: Tokenizer, vocab_size: int) -> Decoding:
    """Return `decoding` with all tokens as ids, and the model's own end-of-sequence ids.

    Raises:
        RequestError: an id is not in the vocabulary, or its numbers contradict each other.
    """
    if decoding.min_new_tokens > decoding.max_new_tokens:
        raise refused(
            "graph",
            f"min_new_tokens={decoding.min_new_tokens} is more than "
            f"max_new_tokens={decoding.max_new_tokens}",
        )
    _check_numbers(decoding)
    bad_words: list[list[int] | str] = []
    for word in decoding.bad_words:
        bad_words += tokenizer.words(word) if isinstance(word, str) else [word]
    for what, ids in (
        ("eos", decoding.eos or []),
        ("bad_words", [token for word in bad_words for token in word]),
        ("logit_bias", decoding.logit_bias),
    ):
        _check_ids(what, ids, vocab_size)
    eos = decoding.eos
    if eos is None:
        eos = [token for token in tokenizer.eos if token < vocab_size]
    return replace(decoding, eos=eos, bad_words=bad_words)


def continuation(
    graph: Graph,
    prompts: list[list[int]],
    decoding: Decoding,
    *,
    sharing: int,
    alone: bool,
    pad: int,
) -> Continuation:
    """Return what the scheduler needs to know about a generation.

    Args:
        graph: what runs in it.
        prompts: token ids of each sequence.
        decoding: how it goes on.
        sharing: whose KV cache it may use, and add to.
        alone: its numbers must not depend on others: what they have computed is not taken.
        pad: fed to sequences that have ended.
    """
    reads = [graph.steps_of(n) for n, node in enumerate(graph.nodes) if isinstance(node, ReadHook)]
    writes = [
        graph.steps_of(n) for n, node in enumerate(graph.nodes) if isinstance(node, WriteHook)
    ]
    single = len(prompts) == 1
    unseen = not any(0 in steps for steps in (*reads, *writes))
    untouched = not any(0 in steps for steps in writes)
    return Continuation(
        prompts=prompts,
        max_new_tokens=decoding.max_new_tokens,
        sharing=sharing,
        chunkable=single and unseen,
        takes_cached=single and unseen and not alone,
        registers_prompt=untouched,
        registers_rest=not writes,
        lockstep=not single and any(map(_beyond_prefill, (*reads, *writes))),
        pad=pad,
    )


def _beyond_prefill(steps: Steps) -> bool:
    return steps.last is None or steps.last >= 1


def _check_numbers(decoding: Decoding) -> None:
    numbers = {
        "temperature": decoding.temperature,
        "top_p": decoding.top_p,
        "min_p": decoding.min_p,
        "repetition_penalty": decoding.repetition_penalty,
        **{f"logit_bias[{token}]": value for token, value in decoding.logit_bias.items()},
    }
    for name, value in numbers.items():
        if value is not None and (math.isnan(value) or value == math.inf):
            raise refused("graph", f"{name} is {value}")


def _check_ids(what: str, ids: Iterable[int | str], vocab_size: int) -> None:
    for token in ids:
        if isinstance(token, int) and token >= vocab_size:
            raise refused(
                "graph", f"{what} has token id {token}; the model knows 0 to {vocab_size - 1}"
            )
