"""A sparse autoencoder, trained on the server and spliced into the model.

It learns to write a layer's residual stream with few active features (Bricken et al. 2023); then
the model runs on what it reconstructs, with all features and with the strongest switched off.

    python docs/examples/sae_splice.py [URL]                 # without a URL: a private server
"""

from __future__ import annotations

import sys

import numpy as np

from ndif_client import ops, optim
from ndif_client.blocking import connect

TEXTS = [
    "The Eiffel Tower is in the city of Paris, and the Colosseum is in the city of Rome.",
    "Berlin is the capital of Germany, and Madrid is the capital of Spain.",
    "The river Thames flows through London, and the Seine flows through Paris.",
]
PROMPT = "The Eiffel Tower is in the city of"
LAYER, FEATURES, STEPS = 24, 256, 60

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model, size = session.model, session.tree.hidden_size
    random = np.random.default_rng(0)
    decoder = random.standard_normal((FEATURES, size)).astype(np.float32)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    weights = {
        "decode": session.upload(decoder, "sae.decode"),
        "encode": session.upload(decoder.T.copy(), "sae.encode"),
        "gate": session.upload(np.zeros(FEATURES, np.float32), "sae.gate"),
        "centre": session.upload(np.zeros(size, np.float32), "sae.centre"),
    }

    def encode(hidden):
        """Return features and the scale the states were brought to."""
        scale = hidden.norm(dim=-1, keepdim=True) / size**0.5
        centred = hidden / scale - weights["centre"]
        return (centred @ weights["encode"] + weights["gate"]).relu(), scale

    def decode(features, scale):
        return (features @ weights["decode"] + weights["centre"]) * scale

    adam = optim.Adam(weights.values(), lr=3e-3)
    with session.chain() as chain:
        for step in range(STEPS):
            with chain.trace(TEXTS[step % len(TEXTS)]) as trace:
                hidden = model.layers[LAYER].resid[0, 1:].float()
                features, scale = encode(hidden)
                error = ((decode(features, scale) - hidden) / scale).square().mean()
                trace.error = error
                trace.active = (features > 0).float().mean()
                (error + 0.05 * features.sum(-1).mean() / size**0.5).backward()
                adam.step()
    first, last = chain.results[0], chain.results[-1]
    print(f"unexplained variance {float(first.error):.2f} -> {float(last.error):.3f}; ", end="")
    print(f"{float(first.active):.0%} -> {float(last.active):.0%} of the features are active")
    with session.trace() as trace:
        with trace.invoke(PROMPT):
            trace.plain = model.unembed.output[0, -1].topk(3).indices
        for name, kept in (("spliced", None), ("without", 1)):
            with trace.invoke(PROMPT):
                hidden = model.layers[LAYER].resid
                features, scale = encode(hidden[:, 1:].float())
                if kept is not None:
                    strongest = features.amax(-1, keepdim=True)
                    features = ops.where(features == strongest, 0.0, features)
                hidden[:, 1:] = decode(features, scale).to(session.tree.dtype)
                model.unembed.output[0, -1].topk(3).indices.save(name)
    for name in ("plain", "spliced", "without"):
        words = [session.decode([int(i)]) for i in trace.result[name]]
        print(f"  {name:8s} {PROMPT!r} goes on with {words}")
