"""A transcoder in the place of an MLP: the same map, through features one can look at.

It learns what an MLP computes from what enters it (Dunefsky et al. 2024), and then takes its place:
the module is skipped with what the transcoder gives.

    python docs/examples/transcoder_splice.py [URL]          # without a URL: a private server
"""

from __future__ import annotations

import sys

import numpy as np

from ndif_client import optim
from ndif_client.blocking import connect

TEXTS = [
    "The Eiffel Tower is in the city of Paris, and the Colosseum is in the city of Rome.",
    "Berlin is the capital of Germany, and Madrid is the capital of Spain.",
    "The river Thames flows through London, and the Seine flows through Paris.",
]
PROMPT = "The Eiffel Tower is in the city of"
LAYER, FEATURES, STEPS = 24, 256, 60

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    mlp, size = session.model.layers[LAYER].mlp, session.tree.hidden_size
    random = np.random.default_rng(0)
    start = random.standard_normal((size, FEATURES)).astype(np.float32) / size**0.5
    encoder = session.upload(start, "transcoder.in")
    decoder = session.upload(0.1 * start.T.copy(), "transcoder.out")

    def transcoded(entered):
        return (entered.float() @ encoder).relu() @ decoder

    adam = optim.Adam([encoder, decoder], lr=3e-3)
    with session.chain() as chain:
        for step in range(STEPS):
            with chain.trace(TEXTS[step % len(TEXTS)]) as trace:
                wanted = mlp.output[0, 1:].float()
                missed = (transcoded(mlp.input[0, 1:]) - wanted).square().mean()
                trace.error = missed / wanted.square().mean()
                trace.error.backward()
                adam.step()
    errors = [float(result.error) for result in chain.results]
    print(f"unexplained: {errors[0]:.2f} -> {errors[-1]:.3f} of what the MLP of layer {LAYER} adds")
    with session.trace() as trace:
        with trace.invoke(PROMPT):
            session.model.unembed.output[0, -1].topk(3).indices.save("plain")
        with trace.invoke(PROMPT):
            mlp.skip(transcoded(mlp.input).to(session.tree.dtype))
            session.model.unembed.output[0, -1].topk(3).indices.save("transcoded")
        with trace.invoke(PROMPT):
            mlp.skip(mlp.input * 0)
            session.model.unembed.output[0, -1].topk(3).indices.save("nothing")
    for name in ("plain", "transcoded", "nothing"):
        words = [session.decode([int(i)]) for i in trace.result[name]]
        print(f"  {name:10s} {PROMPT!r} goes on with {words}")
