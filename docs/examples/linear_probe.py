"""A linear probe, trained on the server: where does the model know what kind of thing it reads?

Weights, optimiser state and activations stay on the server; only the losses come back.

    python docs/examples/linear_probe.py [URL]               # without a URL: a private server
"""

from __future__ import annotations

import sys

import numpy as np

from ndif_client import ops, optim
from ndif_client.blocking import connect

ANIMALS = ["The dog", "A small cat", "My horse", "The old cow", "One bird", "A wild lion"]
CITIES = ["In Paris", "Near London", "From Berlin", "Around Rome", "To Madrid", "Beyond Tokyo"]
TESTED = {"The sheep": 0, "A grey wolf": 0, "In Vienna": 1, "Near Moscow": 1}
LAYERS, EPOCHS = (0, 10, 20), 8

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    prompts = [prompt for pair in zip(ANIMALS, CITIES, strict=True) for prompt in pair]
    labels = np.array([0, 1] * len(ANIMALS))
    size = session.tree.hidden_size

    def states(layer: int) -> object:
        hidden = session.model.layers[layer].resid[:, -1].float()
        return hidden / hidden.norm(dim=-1, keepdim=True)

    for layer in LAYERS:
        weight = session.upload(np.zeros((2, size), np.float32), f"probe-{layer}")
        adam = optim.Adam([weight], lr=0.05)
        with session.chain() as chain:
            for start in [0, 4, 8] * EPOCHS:
                batch = slice(start, start + 4)
                with chain.trace(prompts[batch]) as trace:
                    loss = ops.cross_entropy(states(layer) @ weight.mT, labels[batch])
                    trace.loss = loss
                    loss.backward()
                    adam.step()
        with session.trace(list(TESTED)) as test:
            test.guesses = (states(layer) @ weight.mT).argmax(-1)
        losses = [float(result.loss) for result in chain.results]
        right = (np.asarray(test.result.guesses) == list(TESTED.values())).sum()
        print(
            f"layer {layer:2d}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps, "
            f"{right} of {len(TESTED)} new prompts right"
        )
