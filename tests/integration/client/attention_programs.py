"""What researchers do inside of attentions, beside transformers' eager attention."""

from __future__ import annotations

from typing import Any

import torch

from ndif_client import Session
from ndif_client.trace import Trace
from tests.integration.client.plain import Plain
from tests.integration.client.programs import COLOSSEUM, EIFFEL, Values, program


def _patterns(plain: Plain) -> Values:
    return {"patterns": plain.patterns(EIFFEL)}


@program(_patterns)
def the_pattern_of_every_layer(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        trace.patterns = [layer.attn.pattern for layer in session.model.layers]
    return trace


def _without_the_first(plain: Plain) -> Values:
    def drop(layer: int, pattern: torch.Tensor) -> torch.Tensor:
        if layer != 1:
            return pattern
        pattern = pattern.clone()
        pattern[:, 1:3, :, 0] = 0
        return pattern

    return {"logits": plain.attend(EIFFEL, pattern=drop)}


@program(_without_the_first)
def two_heads_that_never_attend_to_the_first_token(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        session.model.layers[1].attn.pattern[:, 1:3, :, 0] = 0
        trace.logits = session.model.output.logits
    return trace


def _knocked_out(plain: Plain) -> Values:
    def block(layer: int, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, :, -1, 2] = -1e9
        return scores

    return {"logits": plain.attend(EIFFEL, scores=block)}


@program(_knocked_out)
def attention_knocked_out_in_all_layers(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        for layer in session.model.layers:
            layer.attn.scores[:, :, -1, 2] = -1e9
        trace.logits = session.model.output.logits
    return trace


def _others_patterns(plain: Plain) -> Values:
    others = plain.patterns(COLOSSEUM)
    return {"logits": plain.attend(EIFFEL, pattern=lambda layer, own: others[layer])}


@program(_others_patterns)
def the_patterns_of_another_prompt(session: Session) -> Trace:
    layers = session.model.layers
    with session.trace() as trace:
        with trace.invoke(COLOSSEUM):
            others = [layer.attn.pattern for layer in layers]
        with trace.invoke(EIFFEL):
            for layer, other in zip(layers, others, strict=True):
                layer.attn.pattern = other
            trace.logits = session.model.output.logits
    return trace


def _sharpened(plain: Plain) -> Values:
    logits = plain.attend(EIFFEL, scores=lambda layer, own: own * 2 if layer == 2 else own)
    return {"logits": logits}


@program(_sharpened)
def a_sharper_attention(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        session.model.layers[2].attn.query *= 2
        trace.logits = session.model.output.logits
    return trace


def _pattern_gradients(plain: Plain) -> Values:
    seen: dict[int, Any] = {}

    def watch(layer: int, pattern: torch.Tensor) -> torch.Tensor:
        seen[layer] = pattern.requires_grad_() if pattern.is_leaf else pattern
        seen[layer].retain_grad()
        return seen[layer]

    logits = plain.attend(EIFFEL, pattern=watch, grad=True)
    logits[0, -1, 7].backward()
    gradients = [seen[layer].grad for layer in range(len(plain.layers))]
    return {
        "gradients": gradients,
        "scores": torch.stack(
            [(seen[n].detach() * g).sum((0, 2, 3)) for n, g in enumerate(gradients)]
        ),
    }


@program(_pattern_gradients)
def attribution_of_attention_patterns(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        patterns = [layer.attn.pattern for layer in session.model.layers]
        session.model.output.logits[0, -1, 7].backward()
        trace.gradients = [pattern.grad for pattern in patterns]
        trace.scores = torch.stack([(p * p.grad).sum((0, 2, 3)) for p in patterns])
    return trace


def _stopped(plain: Plain) -> Values:
    kept: list[torch.Tensor] = []

    def keep(out: torch.Tensor) -> torch.Tensor:
        kept.append(out.requires_grad_())
        return out

    def stop(layer: int, pattern: torch.Tensor) -> torch.Tensor:
        return pattern.detach()

    logits = plain.attend(EIFFEL, pattern=stop, grad=True, post=[(plain.embed, keep)])
    (gradient,) = torch.autograd.grad(logits[0, -1].logsumexp(-1), kept[0])
    return {"gradient": gradient}


@program(_stopped)
def gradients_with_frozen_attention(session: Session) -> Trace:
    model = session.model
    with session.trace(EIFFEL) as trace:
        embedded = model.embed.output
        for layer in model.layers:
            layer.attn.pattern = layer.attn.pattern.detach()
        model.output.logits[0, -1].logsumexp(-1).backward()
        trace.gradient = embedded.grad
    return trace
