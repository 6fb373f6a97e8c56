"""Causal tracing: which states carry a fact to the answer?

The subject's embeddings are blurred with noise; then one state at a time is put back as it was
(Meng et al. 2022, "Locating and Editing Factual Associations in GPT").

    python docs/examples/causal_tracing.py [URL]             # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client import ops
from ndif_client.blocking import connect

SUBJECT, REST = "The Eiffel Tower", " is in the city of"

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    (paris,) = session.tokenize(" Paris").ids
    prompt = SUBJECT + REST
    subject = len(session.tokenize(SUBJECT).ids)
    last = len(session.tokenize(prompt).ids) - 1
    layers = range(0, 30, 3)
    with session.trace(seed=0) as trace:
        with trace.invoke(prompt):
            clean = {n: model.layers[n].resid for n in layers}
            embedded = model.embed.output[:, :subject]
            trace.clean = model.unembed.output[0, -1].softmax(-1)[paris]
            noise = ops.randn_like(embedded) * embedded.std() * 3

        def blurred():
            model.embed.output[:, :subject] += noise
            return model.unembed.output[0, -1].softmax(-1)[paris]

        with trace.invoke(prompt):
            trace.noisy = blurred()
        restored = {}
        for place, position in (("subject", subject - 1), ("last token", last)):
            for n in layers:
                with trace.invoke(prompt):
                    model.embed.output[:, :subject] += noise
                    model.layers[n].resid[:, position] = clean[n][:, position]
                    restored[f"{place}, {n}"] = model.unembed.output[0, -1].softmax(-1)[paris]
        trace.restored = restored
    result = trace.result
    print(f"p(Paris): {float(result.clean):.3f}, with a blurred subject {float(result.noisy):.3f}")
    print("with one state put back, after layer")
    for place in ("subject", "last token"):
        shown = [f"{n}: {float(result.restored[f'{place}, {n}']):.2f}" for n in layers]
        print(f"  at the {place:10s} {'  '.join(shown)}")
