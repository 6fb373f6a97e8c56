"""Tuned lens: a small translator per layer makes early states readable.

An affine map, trained to bring the lens's distribution closer to the model's final one
(Belrose et al. 2023), is compared with the plain logit lens on a text it has not seen.

    python docs/examples/tuned_lens.py [URL]                 # without a URL: a private server
"""

from __future__ import annotations

import sys

import numpy as np

from ndif_client import ops, optim
from ndif_client.blocking import connect

TEXTS = [
    "The sun rises in the east and sets in the west, and the moon follows it at night.",
    "She opened the old book and began to read the story of a king and his three sons.",
    "Water boils at one hundred degrees, and freezes at zero, as every child learns at school.",
    "The train to the city leaves every hour from the station near the river.",
]
UNSEEN = "He walked along the road to the village, where his mother was waiting for him."
LAYER, STEPS = 15, 24

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model, size = session.model, session.tree.hidden_size
    matrix = session.upload(np.zeros((size, size), np.float32), "lens.matrix")
    bias = session.upload(np.zeros(size, np.float32), "lens.bias")

    def divergence(translate: bool) -> object:
        hidden = model.layers[LAYER].resid[0].float()
        if translate:
            hidden = hidden + hidden @ matrix + bias
        lens = model.unembed(model.norm(hidden.to(session.tree.dtype))).float()
        final = model.unembed.output[0].float().detach()
        return ops.kl_div(
            lens.log_softmax(-1), final.log_softmax(-1), reduction="batchmean", log_target=True
        )

    adam = optim.Adam([matrix, bias], lr=2e-4)
    with session.chain() as chain:
        for step in range(STEPS):
            with chain.trace(TEXTS[step % len(TEXTS)]) as trace:
                trace.loss = divergence(translate=True)
                trace.loss.backward()
                adam.step()
    with session.trace(UNSEEN) as trace:
        trace.plain, trace.tuned = divergence(translate=False), divergence(translate=True)
    losses = [float(result.loss) for result in chain.results]
    print(f"training: {losses[0]:.2f} -> {losses[-1]:.2f} nats from the final distribution")
    print(
        f"on an unseen text, after layer {LAYER}: logit lens {float(trace.result.plain):.2f}, ",
        end="",
    )
    print(f"tuned lens {float(trace.result.tuned):.2f}")
