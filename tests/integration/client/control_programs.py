"""What researchers write with conditions, choices and loops, beside the same in plain Python."""

from __future__ import annotations

from typing import Any

import torch

from ndif_client import Session
from ndif_client.trace import Trace
from tests.integration.client.plain import Plain, changed
from tests.integration.client.programs import EIFFEL, Values, program


def _both_ways(plain: Plain) -> Values:
    kept: list[torch.Tensor] = []

    def steer(stream: torch.Tensor) -> torch.Tensor:
        positive = float(stream[0, -1].sum()) > 0
        kept.append(torch.tensor(positive))
        out = changed(stream, (slice(None), -1), 2 * stream[:, -1])
        return out if positive else changed(stream, (slice(None), 0), stream[:, 0] - 1)

    logits = plain.run(EIFFEL, post=[(plain.layers[0], steer), (plain.layers[2], steer)])
    return {"logits": logits, "first": kept[0], "second": kept[1]}


@program(_both_ways)
def written_in_place_in_both_branches(session: Session) -> Trace:
    model = session.model
    with session.trace(EIFFEL) as trace:
        for name, layer in (("first", model.layers[0]), ("second", model.layers[2])):
            positive = layer.resid[0, -1].sum() > 0
            with trace.when(positive) as branch:
                layer.resid[:, -1] *= 2
            with branch.otherwise():
                layer.resid[:, 0] -= 1
            setattr(trace, name, positive)
        trace.logits = model.output.logits
    return trace


def _nested(plain: Plain) -> Values:
    def steer(stream: torch.Tensor) -> torch.Tensor | None:
        norms = stream[0].norm(dim=-1)
        if not norms[0] > 0:
            return None
        if norms[1] > norms[2]:
            return changed(stream, (slice(None), 3), stream[:, 1])
        return changed(stream, (slice(None), 3), stream[:, 2])

    return {"logits": plain.run(EIFFEL, post=[(plain.layers[1], steer)])}


@program(_nested)
def conditions_in_conditions(session: Session) -> Trace:
    layer = session.model.layers[1]
    with session.trace(EIFFEL) as trace:
        with trace.when(layer.resid[0, 0].norm() > 0):
            norms = layer.resid[0].norm(dim=-1)
            with trace.when(norms[1] > norms[2]) as larger:
                layer.resid[:, 3] = layer.resid[:, 1]
            with larger.otherwise():
                layer.resid[:, 3] = layer.resid[:, 2]
        trace.logits = session.model.output.logits
    return trace


def _not_taken(plain: Plain) -> Values:
    streams = plain.streams(EIFFEL)
    return {"logits": plain.run(EIFFEL), "stream": streams[1]}


@program(_not_taken)
def what_is_not_taken_leaves_everything(session: Session) -> Trace:
    layer = session.model.layers[1]
    with session.trace(EIFFEL) as trace:
        stream = layer.resid
        with trace.when((stream * 0).sum() > 0):
            stream[:] = 0
            layer.resid[:] = 5
            session.model.layers[2].attn.heads[0].result[:] = 0
        trace.stream = stream
        trace.logits = session.model.output.logits
    return trace


def _halved(plain: Plain) -> Values:
    def halve(stream: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            if stream.norm() > 1:
                stream = stream / 2
        return stream

    return {"logits": plain.run(EIFFEL, post=[(plain.layers[1], halve)])}


@program(_halved)
def a_stream_halved_until_it_is_small(session: Session) -> Trace:
    layer = session.model.layers[1]
    with session.trace(EIFFEL) as trace:
        layer.resid = trace.while_loop(
            lambda stream: stream.norm() > 1, lambda stream: stream / 2, layer.resid, limit=6
        )
        trace.logits = session.model.output.logits
    return trace


def _larger(plain: Plain) -> Values:
    streams = plain.streams(EIFFEL)
    first, last = streams[0][:, -1], streams[-1][:, -1]
    found = first if first.norm() > last.norm() else last
    return {"larger": found, "smaller": last if found is first else first}


@program(_larger)
def the_larger_of_two_values(session: Session) -> Trace:
    layers = session.model.layers
    with session.trace(EIFFEL) as trace:
        first, last = layers[0].resid[:, -1], layers[-1].resid[:, -1]
        wins = first.norm() > last.norm()
        trace.larger = trace.choose(wins, first, last)
        trace.smaller = trace.choose(wins, last, first)
    return trace


def _spread(plain: Plain) -> Values:
    logits = plain.run(EIFFEL)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return {"uncertain": torch.where(entropy > entropy.mean(), entropy, entropy * 0)}


@program(_spread)
def where_elements_decide(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        logits: Any = session.model.output.logits
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        trace.uncertain = (entropy > entropy.mean()) * entropy
    return trace
