"""What researchers do to a model that generates, beside the same with plain hooks step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ndif_client import Session
from ndif_client.generation import Generation
from tests.integration.client.plain import Plain, changed
from tests.integration.client.programs import EIFFEL, SHORT, Values, program

STEPS = 5


def _tokens(plain: Plain, **hooks: Any) -> torch.Tensor:
    return torch.tensor(plain.generate(EIFFEL, STEPS, **hooks))


def _begun(session: Session, ids: list[int] = EIFFEL, steps: int = STEPS) -> Generation:
    return session.generate(ids, max_new_tokens=steps, eos=False)


def _newest(session: Session) -> Any:
    """Return the id that the model makes of a step."""
    return session.model.output.logits[:, -1].argmax(-1)


def _each(tokens: torch.Tensor) -> list[torch.Tensor]:
    return [token.reshape(1) for token in tokens]


def _seen_everywhere(plain: Plain) -> Values:
    seen: list[torch.Tensor] = []

    def look(stream: torch.Tensor) -> None:
        seen.append(stream[:, -1])

    tokens = _tokens(plain, post=lambda step: [(plain.layers[1], look)])
    return {"stream": seen, "ids": _each(tokens)}


@program(_seen_everywhere)
def stream_at_every_step(session: Session) -> Generation:
    with _begun(session) as generation, generation.all():
        generation.stream = session.model.layers[1].resid[:, -1]
        generation.ids = _newest(session)
    return generation


def _steered(from_step: int, to_step: int) -> Callable[[Plain], Values]:
    def expected(plain: Plain) -> Values:
        layer = plain.layers[1]

        def hooks(step: int) -> Any:
            return [(layer, lambda x: x * 1.5 + 0.3)] if from_step <= step < to_step else []

        return {"ids": _each(_tokens(plain, post=hooks))}

    return expected


@program(_steered(0, STEPS))
def steering_at_every_step(session: Session) -> Generation:
    layer = session.model.layers[1]
    with _begun(session) as generation, generation.all():
        layer.resid[:] = layer.resid * 1.5 + 0.3
        generation.ids = _newest(session)
    return generation


@program(_steered(1, 3))
def steering_at_some_steps(session: Session) -> Generation:
    layer = session.model.layers[1]
    with _begun(session) as generation:
        with generation.steps[1:3]:
            layer.resid[:] = layer.resid * 1.5 + 0.3
        with generation.all():
            generation.ids = _newest(session)
    return generation


DONOR = [*SHORT, *SHORT, 4]


def _patched_prompt(plain: Plain) -> Values:
    donor, at = plain.streams(DONOR)[0], (slice(None), slice(1, 4))

    def hooks(step: int) -> Any:
        return [(plain.layers[0], lambda x: changed(x, at, donor[at]))] if step == 0 else []

    return {"ids": _each(_tokens(plain, post=hooks))}


@program(_patched_prompt)
def a_patched_prompt_that_later_steps_attend_to(session: Session) -> Generation:
    layer = session.model.layers[0]
    generation = session.generate(max_new_tokens=STEPS, eos=False)
    with generation:
        with generation.invoke(DONOR):
            donor = layer.resid[:, 1:4]
        with generation.invoke(EIFFEL):
            layer.resid[:, 1:4] = donor
            with generation.all():
                generation.ids = _newest(session)
    return generation


def _prompt_in_later_steps(plain: Plain) -> Values:
    kept: list[torch.Tensor] = []

    def hooks(step: int) -> Any:
        if step == 0:
            return [(plain.layers[0], lambda x: kept.append(x[:, -1]))]
        return [(plain.layers[2], lambda x: changed(x, (slice(None), -1), kept[0]))]

    return {"ids": _each(_tokens(plain, post=hooks))}


@program(_prompt_in_later_steps)
def a_value_of_the_prompt_written_at_later_steps(session: Session) -> Generation:
    layers = session.model.layers
    with _begun(session) as generation:
        first = layers[0].resid[:, -1]
        with generation.steps[1:]:
            layers[2].resid[:, -1] = first
        with generation.all():
            generation.ids = _newest(session)
    return generation


def _without_a_head(plain: Plain) -> Values:
    def drop(value: torch.Tensor) -> torch.Tensor:
        heads = value.clone().unflatten(-1, (plain.heads, -1))
        heads[:, :, 1] = 0
        return heads.flatten(2)

    return {"ids": _each(_tokens(plain, pre=lambda step: [(plain.projection(2), drop)]))}


@program(_without_a_head)
def a_head_ablated_at_every_step(session: Session) -> Generation:
    with _begun(session) as generation, generation.all():
        session.model.layers[2].attn.heads[1].result[:] = 0
        generation.ids = _newest(session)
    return generation


def _forced(plain: Plain) -> Values:
    def hooks(step: int) -> Any:
        return [(plain.model.lm_head, lambda x: changed(x, (..., 7), 1e9))] if step == 2 else []

    tokens = _tokens(plain, post=hooks)
    assert tokens[2] == 7
    return {"ids": _each(tokens)}


@program(_forced)
def a_token_forced_by_its_logit(session: Session) -> Generation:
    with _begun(session) as generation:
        with generation.steps[2]:
            session.model.unembed.output[..., 7] = 1e9
        with generation.all():
            generation.ids = _newest(session)
    return generation


def _lens(plain: Plain) -> Values:
    seen: list[torch.Tensor] = []

    def look(stream: torch.Tensor) -> None:
        if stream.shape[1] == 1:
            seen.append(plain.lens(stream)[:, -1].argmax(-1))

    plain.generate(EIFFEL, STEPS, post=lambda step: [(plain.layers[0], look)])
    return {"ids": seen}


@program(_lens)
def a_logit_lens_of_the_new_tokens(session: Session) -> Generation:
    model = session.model
    with _begun(session) as generation, generation.steps[1:]:
        stream = model.layers[0].resid
        generation.ids = model.unembed(model.norm(stream))[:, -1].argmax(-1)
    return generation


#: The step after which a generation is ended by what its stream is.
LAST = 2


def _ended(plain: Plain) -> Values:
    values = _seen_everywhere(plain)
    return {key: value[: LAST + 1] for key, value in values.items()}


@program(_ended)
def ended_at_a_step_by_a_value(session: Session) -> Generation:
    with _begun(session) as generation:
        with generation.all():
            stream = session.model.layers[1].resid[:, -1]
            generation.stream = stream
            generation.ids = _newest(session)
        with generation.steps[LAST]:
            now = session.model.layers[1].resid[:, -1]
            generation.stop_when((now * now).sum() >= 0)
    return generation


def _steered_if(plain: Plain) -> Values:
    def steer(stream: torch.Tensor) -> torch.Tensor | None:
        return stream + 0.7 if float(stream[0, -1].sum()) > 0 else None

    return {"ids": _each(_tokens(plain, post=lambda step: [(plain.layers[1], steer)]))}


@program(_steered_if)
def steering_where_the_stream_says_so(session: Session) -> Generation:
    layer = session.model.layers[1]
    with _begun(session) as generation, generation.all():
        with generation.when(layer.resid[0, -1].sum() > 0):
            layer.resid[:] = layer.resid + 0.7
        generation.ids = _newest(session)
    return generation


def _attended(plain: Plain) -> Values:
    tokens = plain.generate(EIFFEL, STEPS)
    return {"pattern": plain.patterns([*EIFFEL, *tokens[:2]])[1][:, :, -1:]}


@program(_attended)
def the_attention_of_a_new_token(session: Session) -> Generation:
    with _begun(session) as generation, generation.steps[2]:
        generation.pattern = session.model.layers[1].attn.pattern
    return generation
