"""Head ablation: which attention heads does the answer need?

Each head's result is replaced by its mean over the prompt, in an invoke of its own; up to that
layer all of them share their rows.

    python docs/examples/head_ablation.py [URL]              # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

PROMPT = "The Eiffel Tower is in the city of"
LAYERS = range(20, 26)

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    paris, rome = (session.tokenize(city).ids[0] for city in (" Paris", " Rome"))
    with session.trace() as trace:

        def difference():
            logits = model.unembed.output[0, -1].float()
            return logits[paris] - logits[rome]

        with trace.invoke(PROMPT):
            trace.before = difference()
        found = {}
        for n in LAYERS:
            for head in range(len(model.layers[n].attn.heads)):
                with trace.invoke(PROMPT):
                    result = model.layers[n].attn.heads[head].result
                    result[:] = result.mean(1, keepdim=True)
                    found[f"{n}.{head}"] = difference()
        trace.found = found
    before = float(trace.result.before)
    changes = {name: float(value) - before for name, value in trace.result.found.items()}
    print(f"logit(Paris) - logit(Rome) = {before:.2f}; changed most by ablating head")
    for name, change in sorted(changes.items(), key=lambda item: -abs(item[1]))[:6]:
        print(f"  {name:5s} {change:+6.2f}")
    print(f"{len(changes)} ablations in one forward")
