"""What the users of a load test ask for: kinds of experiments, drawn at random and written down.

A `Request` is data, so that it can be drawn from a seed, recorded to a file and sent again; a
scenario knows how to draw one and how to write it with the client. Names of modules are those that
mean the same in every family of models.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from ndif_client.progress import OnProgress
from ndif_client.session import Session
from ndif_client.trace import Trace

#: Prompts of heavy saves are so many times as long as the others.
_HEAVY_FACTOR = 8

#: Norm of a steering vector, in times of the square root of the residual stream's width.
_STRENGTH = 0.1


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One experiment as data.

    Attributes:
        scenario: which kind.
        tokens: ids of the prompt.
        other: ids of the second prompt, where there is one.
        layer: that is read or changed, or begins what is.
        new_tokens: to generate; 0 in a trace.
        seed: of anything random that is sent along.
    """

    scenario: str
    tokens: list[int]
    other: list[int] = []
    layer: int = 0
    new_tokens: int = 0
    seed: int = 0


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """What requests are drawn for.

    Attributes:
        layers, vocabulary: of the served model.
        prompt_tokens: smallest and largest length of a prompt.
        new_tokens: of a generation.
    """

    layers: int
    vocabulary: int
    prompt_tokens: tuple[int, int]
    new_tokens: int


@dataclass(frozen=True)
class Scenario:
    """A kind of experiment.

    Attributes:
        meaning: what it is, for people.
        write: records a request as a trace of a session; nothing is sent.
        draw: draws one.
        differentiates: whether a backward follows its forward.
    """

    meaning: str
    write: Callable[[Session, Request, OnProgress], Trace]
    draw: Callable[[str, random.Random, Sizes], Request]
    differentiates: bool = False


# ---------------------------------------------------------------- drawing


def _prompt(rng: random.Random, sizes: Sizes, factor: int = 1) -> list[int]:
    length = rng.randint(*sizes.prompt_tokens) * factor
    return [rng.randrange(sizes.vocabulary) for _ in range(length)]


def _one(name: str, rng: random.Random, sizes: Sizes) -> Request:
    layer = rng.randrange(sizes.layers)
    return Request(scenario=name, tokens=_prompt(rng, sizes), layer=layer)


def _two(name: str, rng: random.Random, sizes: Sizes) -> Request:
    layer = rng.randrange(sizes.layers)
    tokens, other = _prompt(rng, sizes), _prompt(rng, sizes)
    return Request(scenario=name, tokens=tokens, other=other, layer=layer)


def _generation(name: str, rng: random.Random, sizes: Sizes) -> Request:
    return Request(
        scenario=name,
        tokens=_prompt(rng, sizes),
        layer=rng.randrange(sizes.layers),
        new_tokens=sizes.new_tokens,
        seed=rng.randrange(1 << 32),
    )


def _long(name: str, rng: random.Random, sizes: Sizes) -> Request:
    return Request(scenario=name, tokens=_prompt(rng, sizes, _HEAVY_FACTOR))


# ---------------------------------------------------------------- writing


def _hidden_states(session: Session, request: Request, note: OnProgress) -> Trace:
    with session.trace(request.tokens, on_progress=note) as trace:
        trace.hidden = session.model.layers[request.layer].resid
    return trace


def _logit_lens(session: Session, request: Request, note: OnProgress) -> Trace:
    model = session.model
    with session.trace(request.tokens, on_progress=note) as trace:
        trace.guesses = [
            model.unembed(model.norm(layer.resid[:, -1:])).argmax(-1) for layer in model.layers
        ]
    return trace


def _patching(session: Session, request: Request, note: OnProgress) -> Trace:
    model = session.model
    with session.trace(on_progress=note) as trace:
        with trace.invoke(request.other):
            clean = model.layers[request.layer].resid[:, -1]
        with trace.invoke(request.tokens):
            model.layers[request.layer].resid[:, -1] = clean
            trace.logits = model.unembed.output[:, -1]
    return trace


def _steering(session: Session, request: Request, note: OnProgress) -> Trace:
    drawn = np.random.default_rng(request.seed).standard_normal(session.tree.hidden_size)
    direction = (_STRENGTH * drawn).astype(np.float32)
    generation = session.generate(
        # nothing ends it early, so that every such request is as long
        request.tokens,
        max_new_tokens=request.new_tokens,
        eos=False,
        on_progress=note,
    )
    with generation, generation.all():
        session.model.layers[request.layer].resid[:] += direction
    return generation


def _attribution(session: Session, request: Request, note: OnProgress) -> Trace:
    model = session.model
    with session.trace(request.tokens, on_progress=note) as trace:
        embedded = model.embed.output
        model.unembed.output[0, -1].max().backward()
        trace.shares = (embedded.grad * embedded)[0].float().sum(-1)
    return trace


def _heavy_saves(session: Session, request: Request, note: OnProgress) -> Trace:
    with session.trace(request.tokens, on_progress=note) as trace:
        trace.hidden = [layer.resid for layer in session.model.layers]
    return trace


SCENARIOS: dict[str, Scenario] = {
    "hidden-states": Scenario(
        "the hidden states after a random layer, as in the NDIF paper (Fiotto-Kaufman et al. 2025)",
        _hidden_states,
        _one,
    ),
    "logit-lens": Scenario("the likeliest token after every layer", _logit_lens, _one),
    "patching": Scenario(
        "one position of one layer patched from another prompt; the logits", _patching, _two
    ),
    "steering": Scenario("a generation, steered at every step", _steering, _generation),
    "attribution": Scenario(
        "the gradient of a logit, times the embeddings", _attribution, _one, differentiates=True
    ),
    "heavy-saves": Scenario(
        f"the hidden states after every layer, of a prompt {_HEAVY_FACTOR} times as long",
        _heavy_saves,
        _long,
    ),
}

#: Weights of `--scenario mixture`.
MIXTURE: dict[str, float] = {
    "hidden-states": 0.4,
    "logit-lens": 0.15,
    "patching": 0.15,
    "steering": 0.15,
    "attribution": 0.1,
    "heavy-saves": 0.05,
}


def write(session: Session, request: Request, note: OnProgress) -> Trace:
    """Write a request down as a trace of a session, to be awaited; `note` is told its progress.

    Raises:
        NdifError: it can't be written for this model.
    """
    return SCENARIOS[request.scenario].write(session, request, note)


def draw(weights: Mapping[str, float], rng: random.Random, sizes: Sizes) -> Request:
    """Draw a request.

    Args:
        weights: of each scenario.
        rng: all randomness comes from it.
        sizes: of the model and of prompts.
    """
    (name,) = rng.choices(list(weights), weights=list(weights.values()))
    return SCENARIOS[name].draw(name, rng, sizes)


def parse_weights(text: str) -> dict[str, float]:
    """Return the weights of scenarios: of a name, of "mixture", or of "NAME=WEIGHT,NAME=WEIGHT".

    Raises:
        ValueError: no such scenario, or weights that are none or do not add up to 1.
    """
    if text == "mixture":
        return dict(MIXTURE)
    if "=" not in text:
        return {_known(text): 1.0}
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            weight = float(number)
        except ValueError:
            raise ValueError(f"{part!r} is no NAME=WEIGHT, such as patching=0.3") from None
        if not 0 <= weight <= 1:
            raise ValueError(f"the weight of {name} is {number}; it is between 0 and 1")
        if _known(name.strip()) in weights:
            raise ValueError(f"{name} is there twice")
        weights[name.strip()] = weight
    if abs(sum(weights.values()) - 1) > 1e-6:
        raise ValueError(f"the weights add up to {sum(weights.values()):g}; make them add up to 1")
    return weights


def _known(name: str) -> str:
    if name not in SCENARIOS:
        raise ValueError(f"no scenario {name!r}; there are {', '.join(SCENARIOS)}, mixture")
    return name
