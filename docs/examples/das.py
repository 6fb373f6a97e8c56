"""Distributed alignment search: one direction that decides between two answers.

A few orthonormal directions of the residual stream are trained so that swapping what lies along
them between two prompts swaps their answers (Geiger et al. 2023).

    python docs/examples/das.py [URL]                        # without a URL: a private server
"""

from __future__ import annotations

import sys

import numpy as np

from ndif_client import ops, optim
from ndif_client.blocking import connect

BASE, SOURCE = "The Colosseum is in the city of", "The Eiffel Tower is in the city of"
LAYER, SWAPPED, STEPS = 24, 4, 30

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model, width = session.model, session.tree.hidden_size
    paris, rome = (session.tokenize(city).ids[0] for city in (" Paris", " Rome"))
    random = np.random.default_rng(0)
    start = random.standard_normal((width, SWAPPED)).astype(np.float32)
    directions = session.upload(start / width**0.5, "directions")

    def swapped_difference(trace):
        """Return logit(Paris) - logit(Rome) of the base with the source's coordinates."""
        basis = ops.qr(directions).Q
        with trace.invoke(SOURCE):
            source = model.layers[LAYER].resid[0, -1].float()
        with trace.invoke(BASE):
            base = model.layers[LAYER].resid[0, -1].float()
            moved = base + ((source - base) @ basis) @ basis.mT
            model.layers[LAYER].resid[0, -1] = moved.to(session.tree.dtype)
            logits = model.unembed.output[0, -1].float()
            return logits[paris] - logits[rome]

    adam = optim.Adam([directions], lr=0.02)
    with session.chain() as chain:
        for _ in range(STEPS):
            with chain.trace() as trace:
                trace.difference = swapped_difference(trace)
                (-trace.difference).backward()
                adam.step()
    found = [float(result.difference) for result in chain.results]
    print(f"{SWAPPED} of {width} directions of layer {LAYER} swapped from the Eiffel Tower:")
    print(f"  logit(Paris) - logit(Rome) of the Colosseum: {found[0]:+.2f} -> {max(found):+.2f}")
