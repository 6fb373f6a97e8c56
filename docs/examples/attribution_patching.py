"""Attribution patching: two forwards and one backward estimate every patch at once.

Patching each place by itself takes a forward each. To first order, the effect of a patch is the
gradient of the metric at that place times the change there, so one backward estimates them all
(Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale").

    python docs/examples/attribution_patching.py [URL]       # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

CLEAN, CORRUPTED = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    paris, rome = (session.tokenize(city).ids[0] for city in (" Paris", " Rome"))
    with session.trace() as trace:
        with trace.invoke(CLEAN):
            clean = [layer.output for layer in model.model.layers]
        with trace.invoke(CORRUPTED):
            corrupted = [layer.output for layer in model.model.layers]
            logits = model.lm_head.output[0, -1]
            difference = logits[paris] - logits[rome]
        with difference.backward():
            trace.estimates = [
                (after.grad[:, -1] * (before[:, -1] - after[:, -1])).sum()
                for before, after in zip(clean, corrupted, strict=True)
            ]
    print(f"estimated change of logit(Paris) - logit(Rome) of {CORRUPTED!r}")
    for number, estimate in enumerate(trace.result.estimates):
        print(f"  after layer {number:2d}  {float(estimate):+6.2f}")
