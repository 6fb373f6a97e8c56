"""Gradient editing: how much of an early state's effect goes through the MLPs?

In the backward pass, the gradients that come back through the MLPs are set to zero, which leaves
what flows along the residual stream and through attention.

    python docs/examples/gradient_editing.py [URL]           # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

PROMPT = "The Eiffel Tower is in the city of"
LAYER = 5

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    (paris,) = session.tokenize(" Paris").ids
    with session.trace(PROMPT) as trace:
        early = model.layers[LAYER].resid
        mlps = [layer.mlp.output for layer in list(model.layers)[LAYER + 1 :]]
        logit = model.unembed.output[0, -1, paris]
        with logit.backward():
            trace.whole = early.grad[0].float().norm(dim=-1)
        with logit.backward():  # a second backward, with edits
            for mlp in mlps:
                mlp.grad[:] = 0
            trace.without = early.grad[0].float().norm(dim=-1)
    result = trace.result
    print(f"gradient of logit(Paris) after layer {LAYER}, whole and with no way through MLPs")
    for token, whole, without in zip(result.tokens, result.whole, result.without, strict=True):
        print(f"  {token!r:10s} {float(whole):7.3f} {float(without):7.3f}")
