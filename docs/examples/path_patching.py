"""Path patching: does one attention layer act on the answer directly, or through later ones?

The layer's output is patched from another prompt for everybody, or for the final norm alone
(Wang et al. 2022, "Interpretability in the Wild"): the later layers then see the original.

    python docs/examples/path_patching.py [URL]              # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

CLEAN, CORRUPTED = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    paris, rome = (session.tokenize(city).ids[0] for city in (" Paris", " Rome"))
    layers = range(18, 30)
    with session.trace() as trace:
        with trace.invoke(CLEAN):
            clean = {n: model.layers[n].attn.output[0][:, -1] for n in layers}

        def difference():
            logits = model.unembed.output[0, -1].float()
            return logits[paris] - logits[rome]

        with trace.invoke(CORRUPTED):
            corrupted = {n: model.layers[n].attn.output[0][:, -1] for n in layers}
            trace.before = difference()
        total, direct = [], []
        for n in layers:
            with trace.invoke(CORRUPTED):
                model.layers[n].attn.output[0][:, -1] = clean[n]
                total.append(difference())
            with trace.invoke(CORRUPTED):
                model.norm.input[:, -1] += clean[n] - corrupted[n]
                direct.append(difference())
        trace.total, trace.direct = total, direct
    result = trace.result
    before = float(result.before)
    print(f"logit(Paris) - logit(Rome) of {CORRUPTED!r}: {before:+.2f}; by patching attention")
    for n, all_paths, one in zip(layers, result.total, result.direct, strict=True):
        both = float(all_paths) - before, float(one) - before
        print(f"  layer {n:2d}: {both[0]:+6.2f} by all paths, {both[1]:+6.2f} directly")
