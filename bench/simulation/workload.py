"""Who sends what: kinds of requests, priced by the server's own admission, and kinds of users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from bench.graphs import read_logits, save_layer
from ndif_actor.coordinator.admission import Admission, RequestLimits
from ndif_actor.coordinator.capacity import CacheSize
from ndif_actor.coordinator.choice import ModelChoice
from ndif_actor.coordinator.events import Ticket
from ndif_actor.coordinator.outlook import Outlook
from ndif_client.wire.graph import (
    Apply,
    Backward,
    Graph,
    HookPoint,
    Invoke,
    ReadGradient,
    ReadHook,
    Ref,
    Save,
)
from ndif_client.wire.messages import Decoding, Fault, Submission, TraceRequest

#: Lengths of prompts that are priced, in tokens.
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of request.

    Attributes:
        name: what it is called.
        median_tokens, spread: of its prompt, whose length is log-normal.
        new_tokens: generated after it, on average; 0 for a trace.
        differentiates: whether a backward follows its forward.
    """

    name: str
    median_tokens: int
    spread: float = 0.7
    new_tokens: int = 0
    differentiates: bool = False

    def graph(self, layers: int) -> Graph:
        """Return its graph for a model of so many layers (of the Llama family)."""
        layer = layers // 2
        if not self.differentiates:
            return read_logits(save_layer(layer, logits=True))
        return Graph(
            nodes=[
                ReadHook(HookPoint(f"model.layers.{layer}", "output")),
                ReadHook(HookPoint("lm_head", "output")),
                Apply("sum", [Ref(1)]),
                Backward(Ref(2)),
                ReadGradient(3, Ref(0)),
                Save(Ref(4)),
            ]
        )

    def length(self, rng: np.random.Generator) -> int:
        """Draw the length of a prompt."""
        return int(rng.lognormal(np.log(self.median_tokens), self.spread)) + 1


class User(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of user, who sends some requests, waits for all of them, thinks, and sends again.

    Attributes:
        name: what such users are called.
        mix: how often each kind of request is sent, by name.
        together: requests sent at once.
        think_s: mean of the pause after that, which is exponential.
    """

    name: str
    mix: dict[str, float]
    together: int = 1
    think_s: float = 20.0


KINDS = (
    Kind(name="read", median_tokens=128),
    Kind(name="attribution", median_tokens=64, differentiates=True),
    Kind(name="generation", median_tokens=128, new_tokens=96),
)

#: A researcher tries one thing after the other; a sweep is a script that sends a grid at once.
USERS = {
    "researcher": User(
        name="researcher", mix={"read": 0.6, "attribution": 0.15, "generation": 0.25}
    ),
    "sweep": User(name="sweep", mix={"read": 1.0}, together=64, think_s=60.0),
}


class Prices(msgspec.Struct, frozen=True):
    """What each kind of request costs at each length, as the server's admission has found."""

    tickets: dict[str, dict[int, Ticket]]

    def ticket(self, kind: str, length: int) -> Ticket:
        """Return the ticket of the next length that was priced, or of the longest admitted."""
        priced = self.tickets[kind]
        return priced[next((one for one in priced if one >= length), max(priced))]


async def price(
    folder: Path, kinds: Sequence[Kind], cache: CacheSize, limits: RequestLimits
) -> Prices:
    """Let the admission of a server of this model check and price each kind at each length.

    Lengths that it finds too costly are left out.

    Args:
        folder: of the model: a config.json and a tokenizer; no weights are needed.
        kinds: of requests.
        cache: the KV cache of the server.
        limits: of one request there.

    Raises:
        ValueError: it refuses a kind at any length.
    """
    admission = Admission("", limits)
    await admission.load(ModelChoice(str(folder), "bfloat16", "cpu"), 1)
    admission.set_cache(cache)
    layers = msgspec.json.decode((folder / "config.json").read_bytes())["num_hidden_layers"]
    tickets: dict[str, dict[int, Ticket]] = {}
    try:
        for kind in kinds:
            requests = [_request(kind, length, layers) for length in LENGTHS]
            submission = Submission(requests=requests)
            answers = await admission.admit(submission, [], "simulated", Outlook())
            if isinstance(shortest := answers[0], Fault):
                raise ValueError(f"{kind.name} of {LENGTHS[0]} tokens: {shortest.message}")
            tickets[kind.name] = {
                length: answer.ticket
                for length, answer in zip(LENGTHS, answers, strict=True)
                if not isinstance(answer, Fault)
            }
    finally:
        await admission.close()
    return Prices(tickets)


def _request(kind: Kind, length: int, layers: int) -> TraceRequest:
    request = TraceRequest(
        id=f"{kind.name}-{length}",
        model="",
        invokes=[Invoke([[1] * length])],
        graph=Graph(nodes=[]) if kind.new_tokens else kind.graph(layers),
    )
    if not kind.new_tokens:
        return request
    return replace(request, decoding=Decoding(max_new_tokens=4 * kind.new_tokens, eos=[]))


def draw(
    user: User, kinds: Mapping[str, Kind], rng: np.random.Generator
) -> list[tuple[Kind, int, int]]:
    """Draw what a user sends at once: each request's kind, prompt length and new tokens."""
    names = list(user.mix)
    weights = np.array([user.mix[name] for name in names])
    chosen = rng.choice(len(names), size=user.together, p=weights / weights.sum())
    drawn = []
    for number in chosen:
        kind = kinds[names[number]]
        tokens = 0
        if kind.new_tokens:
            tokens = int(min(rng.geometric(1 / kind.new_tokens), 4 * kind.new_tokens))
        drawn.append((kind, kind.length(rng), tokens))
    return drawn
