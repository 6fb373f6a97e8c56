"""What researchers write, each beside the same written with plain PyTorch hooks on transformers.

A program is a pair: one that records with the client and returns what it saves by name, and one
that computes the same with `Plain`. Module names are the standard ones on our side; on the other,
`Plain` knows where a family keeps its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ndif_client import Session, ops
from ndif_client.trace import Trace
from tests.integration.client.plain import Plain, changed

EIFFEL = [5, 17, 99, 250, 3, 41, 8]
COLOSSEUM = [5, 18, 99, 250, 3, 41, 8]
SHORT = [7, 30, 2]

Values = dict[str, Any]

#: How far a vector is moved at once.
RATE = 0.5

Recorded = Callable[[Session], Trace]
Expected = Callable[[Plain], Values]

PROGRAMS: list[tuple[str, Recorded, Expected]] = []


def program(expected: Expected) -> Callable[[Recorded], Recorded]:
    """Add a program, which records a trace; the values that it saves are those of `expected`."""

    def add(record: Recorded) -> Recorded:
        PROGRAMS.append((record.__name__, record, expected))
        return record

    return add


# ---------------------------------------------------------------- reading


@program(
    lambda plain: {
        "top": torch.stack([plain.lens(s)[:, -1].softmax(-1).max(-1).values for s in _s(plain)]),
        "ids": torch.stack([plain.lens(s)[:, -1].argmax(-1) for s in _s(plain)]),
    }
)
def logit_lens_of_all_layers(session: Session) -> Trace:
    model = session.model
    with session.trace(EIFFEL) as trace:
        lens = [model.unembed(model.norm(layer.resid))[:, -1] for layer in model.layers]
        trace.top = ops.stack([one.softmax(-1).max(-1).values for one in lens])
        trace.ids = ops.stack([one.argmax(-1) for one in lens])
    return trace


def _s(plain: Plain) -> list[torch.Tensor]:
    return plain.streams(EIFFEL)


@program(
    lambda plain: {
        "every": _s(plain)[1][..., ::2],
        "mean": _s(plain)[1].mean(1),
        "last": _s(plain)[1][0, -1],
        "turned": _s(plain)[1].flip(1)[:, :, None],
        "positive": torch.where(_s(plain)[1] > 0, _s(plain)[1], 0.0),
        "half": _s(plain)[1].to(torch.float16),
        "norm": _s(plain)[1].norm(dim=-1, keepdim=True),
    }
)
def slices_and_reductions(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        stream = session.model.layers[1].resid
        trace.every = stream[..., ::2]
        trace.mean = stream.mean(1)
        trace.last = stream[0, -1]
        trace.turned = stream.flip(1)[:, :, None]
        trace.positive = ops.where(stream > 0, stream, 0.0)
        trace.half = stream.to("float16")
        trace.norm = stream.norm(dim=-1, keepdim=True)
    return trace


@program(
    lambda plain: {
        "embedded": plain.embed(torch.tensor([EIFFEL])),
        "normed": plain.norm(_s(plain)[-1]),
        "last": plain.run(EIFFEL),
    }
)
def both_ends_of_the_model(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        trace.embedded = session.model.embed.output
        trace.normed = session.model.norm.output
        trace.last = session.model.output.logits
    return trace


def _snapshot(plain: Plain) -> Values:
    before = _s(plain)[1]
    after = changed(before, (slice(None), 1), before[:, 1] + 3)
    return {
        "before": before,
        "after": after,
        "view": before[:, 1],
        "logits": plain.run(EIFFEL, post=[(plain.layers[1], lambda out: after)]),
    }


@program(_snapshot)
def a_save_is_a_snapshot_of_its_moment(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        stream = session.model.layers[1].resid
        trace.before = stream
        trace.view = stream[:, 1]
        session.model.layers[1].resid[:, 1] += 3
        trace.after = session.model.layers[1].resid
        trace.logits = session.model.output.logits
    return trace


# ---------------------------------------------------------------- patching and ablation


def _patched(plain: Plain) -> Values:
    clean = plain.streams(EIFFEL)[1]
    write = lambda out: changed(out, (slice(None), -2), clean[:, 3])  # noqa: E731
    return {"logits": plain.run(SHORT, post=[(plain.layers[1], write)])}


@program(_patched)
def a_position_patched_into_a_shorter_prompt(session: Session) -> Trace:
    with session.trace() as trace:
        with trace.invoke(EIFFEL):
            clean = session.model.layers[1].resid[:, 3]
        with trace.invoke(SHORT):
            session.model.layers[1].resid[:, -2] = clean
            trace.logits = session.model.output.logits
    return trace


def _mean_ablated(plain: Plain) -> Values:
    outputs: list[torch.Tensor] = []
    for ids in (EIFFEL, COLOSSEUM):
        plain.run(ids, post=[(plain.layers[1].mlp, outputs.append)])
    mean = torch.cat(outputs).mean(0, keepdim=True)
    logits = [
        plain.run(ids, post=[(plain.layers[1].mlp, lambda out: mean)])
        for ids in (EIFFEL, COLOSSEUM)
    ]
    return {"logits": torch.cat(logits)}


@program(_mean_ablated)
def an_mlp_set_to_its_mean_over_the_batch(session: Session) -> Trace:
    with session.trace([EIFFEL, COLOSSEUM]) as trace:
        mlp = session.model.layers[1].mlp
        first = mlp.output[0] if _is_tuple(mlp) else mlp.output
        first[:] = first.mean(0, keepdim=True)
        trace.logits = session.model.output.logits
    return trace


def _is_tuple(module: Any) -> bool:
    return "output[0]" in repr(module)


def _without_heads(plain: Plain) -> Values:
    def drop(value: torch.Tensor) -> torch.Tensor:
        heads = value.clone().unflatten(-1, (plain.heads, -1))
        heads[:, :, 1] = 0
        heads[:, -1, 3] *= 0.5
        return heads.flatten(2)

    return {"logits": plain.run(EIFFEL, pre=[(plain.projection(2), drop)])}


@program(_without_heads)
def heads_ablated_before_the_projection(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        attention = session.model.layers[2].attn
        attention.heads[1].result[:] = 0
        attention.heads[3].result[:, -1] *= 0.5
        trace.logits = session.model.output.logits
    return trace


def _skipped(plain: Plain) -> Values:
    stream = _s(plain)[0] * 0.5
    return {"logits": plain.run(EIFFEL, post=[(plain.layers[1], lambda out: stream)])}


@program(_skipped)
def a_layer_skipped_with_a_value(session: Session) -> Trace:
    model = session.model
    with session.trace(EIFFEL) as trace:
        model.layers[1].skip(model.layers[0].resid * 0.5)
        trace.logits = model.output.logits
    return trace


def _inputs(plain: Plain) -> Values:
    logits = plain.run(
        EIFFEL, pre=[(plain.layers[2], lambda value: changed(value, (slice(None), 0), 0.25))]
    )
    return {"logits": logits}


@program(_inputs)
def the_input_of_a_layer_written(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        session.model.layers[2].input[:, 0] = 0.25
        trace.logits = session.model.output.logits
    return trace


def _unembedded(plain: Plain) -> Values:
    made: list[torch.Tensor] = []
    write = lambda out: changed(out, (..., 5), -100.0)  # noqa: E731
    head = plain.model.lm_head
    logits = plain.run(EIFFEL, post=[(head, write), (head, made.append)])
    return {"made": made[0][..., :9], "logits": logits}


@program(_unembedded)
def logits_written_where_they_are_made(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        session.model.unembed.output[..., 5] = -100.0
        trace.made = session.model.unembed.output[..., :9]
        trace.logits = session.model.output.logits
    return trace


def _noised(plain: Plain) -> Values:
    noise = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    return {"logits": plain.run(EIFFEL, post=[(plain.embed, lambda out: out + noise)])}


@program(_noised)
def noise_from_a_seed_added_to_the_embeddings(session: Session) -> Trace:
    with session.trace(EIFFEL, seed=11) as trace:
        embedded = session.model.embed.output
        session.model.embed.output = embedded + embedded.randn_like()
        trace.logits = session.model.output.logits
    return trace


# ---------------------------------------------------------------- gradients


def _attributed(plain: Plain) -> Values:
    kept: list[torch.Tensor] = []

    def watch(out: torch.Tensor) -> torch.Tensor:
        kept.append(out if out.requires_grad else out.clone().requires_grad_())
        return kept[-1]

    logits = plain.run(EIFFEL, post=[(layer, watch) for layer in plain.layers], grad=True)
    loss = logits[0, -1, 42] - logits[0, -1, 7]
    gradients = torch.autograd.grad(loss, kept)
    shares = [(g * h).sum(-1).detach() for g, h in zip(gradients, kept, strict=True)]
    return {"shares": torch.stack(shares), "loss": loss.detach()}


@program(_attributed)
def a_logit_difference_attributed_to_all_layers(session: Session) -> Trace:
    model = session.model
    with session.trace(EIFFEL) as trace:
        streams = [layer.resid for layer in model.layers]
        logits = model.output.logits[0, -1]
        trace.loss = logits[42] - logits[7]
        trace.loss.backward()
        trace.shares = ops.stack([(h.grad * h).sum(-1) for h in streams])
    return trace


def _edited_gradient(plain: Plain) -> Values:
    embedded: list[torch.Tensor] = []

    def watch(out: torch.Tensor) -> torch.Tensor:
        embedded.append(out.clone().requires_grad_())
        return embedded[0]

    def edit(out: torch.Tensor) -> None:
        out.register_hook(lambda gradient: changed(gradient, (slice(None), -1), 0.0))

    logits = plain.run(EIFFEL, post=[(plain.embed, watch), (plain.layers[1], edit)], grad=True)
    (gradient,) = torch.autograd.grad(logits[0, -1].logsumexp(-1), embedded)
    return {"gradient": gradient}


@program(_edited_gradient)
def a_gradient_written_on_its_way_back(session: Session) -> Trace:
    model = session.model
    with session.trace(EIFFEL) as trace:
        embedded, stream = model.embed.output, model.layers[1].resid
        with model.output.logits[0, -1].logsumexp(-1).backward():
            stream.grad[:, -1] = 0
            trace.gradient = embedded.grad
    return trace


def _two_losses(plain: Plain) -> Values:
    kept: list[torch.Tensor] = []

    def watch(out: torch.Tensor) -> torch.Tensor:
        kept.append(out.clone().requires_grad_())
        return kept[0]

    logits = plain.run(EIFFEL, post=[(plain.layers[0], watch)], grad=True)[0, -1]
    first = torch.autograd.grad(logits[3], kept, retain_graph=True)[0]
    second = torch.autograd.grad(logits[4] * 2, kept)[0]
    return {"first": first, "second": second}


@program(_two_losses)
def two_losses_of_one_forward(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        stream = session.model.layers[0].resid
        logits = session.model.output.logits[0, -1]
        with logits[3].backward(retain_graph=True):
            trace.first = stream.grad
        with (logits[4] * 2).backward():
            trace.second = stream.grad
    return trace


def _between_prompts(plain: Plain) -> Values:
    kept: list[torch.Tensor] = []

    def watch(out: torch.Tensor) -> torch.Tensor:
        kept.append(out.clone().requires_grad_())
        return kept[-1]

    clean = plain.run(EIFFEL, post=[(plain.layers[1], watch)], grad=True)
    move = lambda out: changed(out, (slice(None), -1), kept[0][:, 2])  # noqa: E731
    moved = plain.run(SHORT, post=[(plain.layers[1], move)], grad=True)
    loss = (clean[0, -1, 9] - moved[0, -1, 9]) ** 2
    return {"gradient": torch.autograd.grad(loss, kept)[0]}


@program(_between_prompts)
def a_gradient_that_flows_from_one_prompt_into_another(session: Session) -> Trace:
    model = session.model
    with session.trace() as trace:
        with trace.invoke(EIFFEL):
            clean = model.layers[1].resid
            first = model.output.logits[0, -1, 9]
        with trace.invoke(SHORT):
            model.layers[1].resid[:, -1] = clean[:, 2]
            second = model.output.logits[0, -1, 9]
        ((first - second) ** 2).backward()
        trace.gradient = clean.grad
    return trace


# ---------------------------------------------------------------- control and structure


def _conditional(threshold: float) -> Expected:
    def expected(plain: Plain) -> Values:
        def change(out: torch.Tensor) -> torch.Tensor:
            return out * 0.5 if out.norm() > threshold else changed(out, (slice(None), 0), 1.0)

        kept: list[torch.Tensor] = []
        logits = plain.run(EIFFEL, post=[(plain.layers[1], change), (plain.layers[1], kept.append)])
        return {"logits": logits, "stream": kept[0]}

    return expected


def _conditional_program(threshold: float) -> Recorded:
    def record(session: Session) -> Trace:
        with session.trace(EIFFEL) as trace:
            stream = session.model.layers[1].resid
            with trace.when(stream.norm() > threshold) as branch:
                stream[:] = stream * 0.5
            with branch.otherwise():
                stream[:, 0] = 1.0
            trace.stream = stream
            trace.logits = session.model.output.logits
        return trace

    return record


for _threshold in (0.0, 1e9):
    _record = _conditional_program(_threshold)
    _record.__name__ = f"a_write_if_the_norm_is_above_{_threshold:g}"
    program(_conditional(_threshold))(_record)


def _halved(plain: Plain) -> Values:
    value, rounds = _s(plain)[1][0, -1], 0
    while value.norm() > 0.1 and rounds < 40:
        value, rounds = value / 2, rounds + 1
    return {"value": value, "rounds": torch.tensor(rounds)}


@program(_halved)
def a_loop_that_the_values_end(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        last = session.model.layers[1].resid[0, -1]
        trace.rounds, trace.value = trace.while_loop(
            lambda count, value: value.norm() > 0.1,
            lambda count, value: (count + 1, value / 2),
            (0, last),
            limit=40,
        )
    return trace


def _cached(plain: Plain) -> Values:
    streams = plain.streams(EIFFEL, post=[(plain.layers[0], lambda out: out * 2)])
    return {"streams": streams[1:]}


@program(_cached)
def lists_and_dicts_of_saves(session: Session) -> Trace:
    with session.trace(EIFFEL) as trace:
        session.model.layers[0].resid *= 2
        trace.streams = [layer.resid for layer in session.model.layers][1:]
    return trace


# ---------------------------------------------------------------- gradients made of gradients


def _of_a_gradient(plain: Plain) -> Values:
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(stream: torch.Tensor) -> torch.Tensor:
            seen[layer] = stream.clone().requires_grad_() if not stream.requires_grad else stream
            return seen[layer]

        return hook

    logits = plain.run(EIFFEL, post=[(plain.layers[i], keep(i)) for i in (0, 1)], grad=True)
    early, late = seen[0], seen[1]
    (left,) = torch.autograd.grad(logits[0, -1, 7], late, retain_graph=True)
    (gradient,) = torch.autograd.grad((left * late).sum(), early, retain_graph=True)
    (started,) = torch.autograd.grad(late, early, left)
    return {"gradient": gradient, "started": started}


@program(_of_a_gradient)
def a_backward_from_the_gradient_of_another(session: Session) -> Trace:
    model = session.model
    with session.trace(EIFFEL) as trace:
        early, late = model.layers[0].resid, model.layers[1].resid
        model.unembed.output[0, -1, 7].backward()
        left = late.grad
        with (left * late).sum().backward():
            trace.gradient = early.grad
        with late.backward(gradient=left):
            trace.started = early.grad
    return trace


def _moved(plain: Plain) -> Values:
    stream = plain.streams(EIFFEL)[1].detach()
    vector = torch.zeros_like(stream[0, -1])
    losses = []
    for _ in range(3):
        vector = vector.detach().requires_grad_()
        loss = plain.lens(stream[:, -1] + vector)[0].log_softmax(-1)[7]
        losses.append(loss.detach())
        (gradient,) = torch.autograd.grad(loss, vector)
        vector = vector + RATE * gradient
    return {"vector": vector.detach(), "losses": losses}


@program(_moved)
def a_vector_is_moved_along_its_gradient_three_times(session: Session) -> Trace:
    model = session.model
    with session.trace(EIFFEL) as trace:
        stream = model.layers[1].resid.detach()
        vector = stream[0, -1] * 0
        losses = []
        for _ in range(3):
            loss = model.unembed(model.norm(stream[:, -1] + vector))[0].log_softmax(-1)[7]
            losses.append(loss)
            loss.backward()
            vector = vector + RATE * vector.grad
        trace.vector, trace.losses = vector, losses
    return trace


def _without_gradients(plain: Plain) -> Values:
    def change(stream: torch.Tensor) -> torch.Tensor:
        seen.append(stream.clone().requires_grad_())
        with torch.no_grad():
            constant = seen[0] * 0.5
        return seen[0] + constant

    seen: list[torch.Tensor] = []
    logits = plain.run(EIFFEL, post=[(plain.layers[0], change)], grad=True)
    return {"gradient": torch.autograd.grad(logits[0, -1, 7], seen[0])[0]}


@program(_without_gradients)
def a_part_of_what_is_written_is_made_without_gradients(session: Session) -> Trace:
    model = session.model
    with session.trace(EIFFEL) as trace:
        stream = model.layers[0].resid
        with torch.no_grad():
            constant = stream * 0.5
        model.layers[0].resid = stream + constant
        model.unembed.output[0, -1, 7].backward()
        trace.gradient = stream.grad
    return trace
