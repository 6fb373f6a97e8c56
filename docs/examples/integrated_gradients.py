"""Integrated gradients: what each token adds to the answer, adding up to the whole.

The gradient is averaged along a straight way from an empty baseline to the embeddings
(Sundararajan et al. 2017); each step is an invoke, and one backward serves all of them.

    python docs/examples/integrated_gradients.py [URL]       # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

PROMPT, STEPS = "The Eiffel Tower is in the city of", 64

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    (paris,) = session.tokenize(" Paris").ids
    # The very first token keeps its embedding: without it the model has nothing to stand on.
    with session.trace() as trace:
        with trace.invoke(PROMPT):
            whole = model.embed.output.clone()
            whole[:, 0] = 0
            trace.full = model.unembed.output[0, -1].float().log_softmax(-1)[paris]
        points, total = [], None
        for step in range(STEPS):
            with trace.invoke(PROMPT):
                share = (step + 0.5) / STEPS
                model.embed.output[:, 1:] *= share
                points.append(model.embed.output)
                score = model.unembed.output[0, -1].float().log_softmax(-1)[paris]
                total = score if total is None else total + score
        with trace.invoke(PROMPT):
            model.embed.output[:, 1:] = 0
            trace.empty = model.unembed.output[0, -1].float().log_softmax(-1)[paris]
        total.backward()
        gradient = points[0].grad.float()
        for point in points[1:]:
            gradient = gradient + point.grad.float()
        trace.shares = (gradient / STEPS * whole.float())[0].sum(-1)
    result = trace.result
    change = float(result.full) - float(result.empty)
    print(f"log p(Paris) rises by {change:.2f}; the shares add up to {result.shares.sum():.2f}")
    tokens = session.tokenize(PROMPT).tokens
    for token, share in zip(tokens, result.shares, strict=True):
        print(f"  {token!r:10s} {float(share):+6.2f}")
