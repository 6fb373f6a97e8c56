"""Activation patching: from which layer on does the last position hold the answer?

Both prompts run in one forward. The residual stream of the first is copied into the second, one
layer after the other; traces submitted together share forwards.

    python docs/examples/activation_patching.py [URL]        # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

CLEAN, CORRUPTED = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    paris, rome = (session.tokenize(city).ids[0] for city in (" Paris", " Rome"))
    traces = []
    with session.together():
        for layer in model.model.layers:
            with session.trace() as trace:
                with trace.invoke(CLEAN):
                    clean = layer.output[:, -1]
                with trace.invoke(CORRUPTED):
                    layer.output[:, -1] = clean
                    logits = model.lm_head.output[0, -1]
                    trace.difference = logits[paris] - logits[rome]
            traces.append(trace)
    print(f"logit(Paris) - logit(Rome) of {CORRUPTED!r}, patched from {CLEAN!r}:")
    for number, trace in enumerate(traces):
        print(f"  after layer {number:2d}  {float(trace.result.difference):+6.2f}")
    forwards = {trace.result.statistics.forward for trace in traces}
    print(f"{len(traces)} traces ran in {len(forwards)} forward pass(es)")
