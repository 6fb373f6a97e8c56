"""Zero, mean and resample ablation: three ways to take a module's information away.

python docs/examples/resample_ablation.py [URL]          # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

PROMPT = "The Eiffel Tower is in the city of"
OTHERS = [
    f"The {thing} is in the city of" for thing in ("Colosseum", "Kremlin", "Big Ben", "Louvre")
]
LAYERS = range(18, 30, 2)

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    paris, rome = (session.tokenize(city).ids[0] for city in (" Paris", " Rome"))

    def difference():
        logits = model.unembed.output[0, -1].float()
        return logits[paris] - logits[rome]

    with session.trace() as trace:
        with trace.invoke(OTHERS):
            others = {n: model.layers[n].attn.output[0][:, -1] for n in LAYERS}
        with trace.invoke(PROMPT):
            trace.before = difference()
        found = {}
        for n in LAYERS:
            taken = {"zero": 0, "mean": others[n].mean(0), "resample": others[n][0]}
            for way, value in taken.items():
                with trace.invoke(PROMPT):
                    model.layers[n].attn.output[0][:, -1] = value
                    found[f"{n} {way}"] = difference()
        trace.found = found
    print(f"logit(Paris) - logit(Rome): {float(trace.result.before):+.2f}; attention ablated:")
    for n in LAYERS:
        shown = [
            f"{way} {float(trace.result.found[f'{n} {way}']):+6.2f}"
            for way in ("zero", "mean", "resample")
        ]
        print(f"  layer {n:2d}  {'   '.join(shown)}")
