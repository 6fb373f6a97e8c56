"""Where does a name travel? Every layer x position of activation patching, in one trace.

python docs/examples/patching_grid.py [URL]        # without a URL: a private server

Leaves patching_grid.png beside where it is run, if matplotlib is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from ndif_client.blocking import connect

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"
#: Every third layer of the thirty.
LAYERS = range(2, 30, 3)


def plot(grid: np.ndarray, tokens: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_xticks(range(len(tokens)), [token.strip() for token in tokens], rotation=60)
    axes.set_yticks(range(len(LAYERS)), [str(layer) for layer in LAYERS])
    axes.set(xlabel="patched position", ylabel="patched layer", title="back to the clean answer")
    figure.colorbar(image)
    figure.savefig(path)


with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    mary, john = (session.tokenize(name).ids[0] for name in (" Mary", " John"))
    tokens = session.tokenize(CLEAN).tokens

    def lean():
        """How much more likely Mary is than John to get the drink: a difference of logits."""
        logits = model.lm_head.output[0, -1]
        return logits[mary] - logits[john]

    trace = session.trace()
    with trace:
        with trace.invoke(CLEAN):
            streams = {layer: model.model.layers[layer].output[:] for layer in LAYERS}
            clean = lean().save()
        with trace.invoke(CORRUPTED):
            corrupted = lean().save()
        patched = []
        for layer in LAYERS:
            for position in range(len(tokens)):
                with trace.invoke(CORRUPTED):
                    model.model.layers[layer].output[:, position] = streams[layer][:, position]
                    patched.append(lean().save())
        explanation = trace.explain()

    back = np.array([float(lean.value) for lean in patched]) - float(corrupted.value)
    grid = (back / (float(clean.value) - float(corrupted.value))).reshape(len(LAYERS), -1)
    print(f"Mary rather than John: {float(clean.value):+.2f} clean,", end=" ")
    print(f"{float(corrupted.value):+.2f} corrupted; patching one token after a layer brings back")
    for layer, row in zip(LAYERS, grid, strict=True):
        best = int(row.argmax())
        print(f"  layer {layer:2d}: {row[best]:4.0%} at {tokens[best]!r} (token {best})")
    computed, naive = explanation.row_layers
    share = f"{computed / naive:.0%} of their rows x layers"
    print(f"{len(patched)} patched runs in one forward, {share}")
    try:
        plot(grid, tokens, Path("patching_grid.png"))
    except ImportError:
        print("install matplotlib for a picture")
