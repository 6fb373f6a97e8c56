"""Three researchers share one model: a logit lens, activation patching and zero-ablation at once.

Starts a private server with the demo model (fetched once), opens three sessions to it, lets them
work at the same time, and prints what they found and how many forward passes it took.

    python docs/examples/three_researchers.py [--output FOLDER]
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

import matplotlib
import numpy as np

from ndif_client import Session, connect

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PARIS = "The Eiffel Tower is in the city of"
ROME = "The Colosseum is in the city of"

#: Numbers of the forward passes that a researcher's requests ran in.
Forwards = list[int]


async def logit_lens(session: Session, output: Path) -> tuple[str, Forwards]:
    """What would the model say if it stopped after each layer? A heat map tells."""
    model = session.model
    async with session.trace(PARIS) as trace:
        guesses, certainties = [], []
        for layer in model.model.layers:
            probabilities = model.lm_head(model.model.norm(layer.output)).softmax(-1)
            guesses.append(probabilities.argmax(-1).save())
            certainties.append(probabilities.amax(-1).save())
    ids = np.array([np.asarray(guess.value)[0] for guess in guesses])
    certainty = np.array([certainty.value.float().numpy()[0] for certainty in certainties])
    words = {int(i): await session.decode([int(i)]) for i in np.unique(ids)}
    picture = output / "logit_lens.png"
    draw_lens(picture, trace.result.tokens, ids, certainty, words)
    paris = (await session.tokenize(" Paris")).ids[0]
    first = next((i for i, row in enumerate(ids) if row[-1] == paris), None)
    found = f"' Paris' first leads after layer {first} of {len(ids)}; heat map: {picture}"
    return found, [trace.result.statistics.forward]


async def activation_patching(session: Session) -> tuple[str, Forwards]:
    """At which layer does the last position know the city? Copy it from one prompt to another."""
    model = session.model
    paris, rome = [(await session.tokenize(city)).ids[0] for city in (" Paris", " Rome")]

    def measure_with_patch(layer):
        with session.trace() as trace:
            with trace.invoke(PARIS):
                clean = layer.output[:, -1]
            with trace.invoke(ROME):
                layer.output[:, -1] = clean
                logits = model.lm_head.output[:, -1]
                trace.difference = (logits[:, paris] - logits[:, rome]).save()
        return trace

    traces = [measure_with_patch(layer) for layer in model.model.layers]
    results = await asyncio.gather(*traces)
    differences = [float(result.difference) for result in results]
    turn = next((i for i, d in enumerate(differences) if d > 0), None)
    shown = "  ".join(f"{i}: {d:+.1f}" for i, d in enumerate(differences) if i % 5 == 4)
    found = (
        f"logit(Paris) - logit(Rome) on the Rome prompt, patched after layer\n"
        f"      {shown}\n    the answer turns to Paris from layer {turn} on"
    )
    return found, [result.statistics.forward for result in results]


async def zero_ablation(session: Session) -> tuple[str, Forwards]:
    """Which MLP matters most for the answer? Switch each off at the last position."""
    model = session.model
    paris = (await session.tokenize(" Paris")).ids[0]

    def measure_without(mlp):
        with session.trace(PARIS) as trace:
            if mlp is not None:
                mlp.output[:, -1] = 0
            probabilities = model.lm_head.output[0, -1].softmax(-1)
            trace.paris = probabilities[paris].save()
            trace.top = probabilities.topk(5).indices.save()
        return trace

    traces = [measure_without(mlp) for mlp in [None, *(each.mlp for each in model.model.layers)]]
    before, *after = await asyncio.gather(*traces)
    worst = min(range(len(after)), key=lambda i: float(after[i].paris))

    async def top(result):
        return [await session.decode([int(token)]) for token in result.top]

    found = (
        f"before:            {await top(before)}, P(Paris) = {float(before.paris):.3f}\n"
        f"    without MLP {worst:2d}:    {await top(after[worst])}, "
        f"P(Paris) = {float(after[worst].paris):.3f}"
    )
    return found, [result.statistics.forward for result in (before, *after)]


def draw_lens(path, tokens, ids, certainty, words):
    """Draw layers against positions, coloured by certainty, with the guessed token in each cell."""
    figure, axes = plt.subplots(figsize=(1.1 * len(tokens), 0.28 * len(ids) + 1))
    image = axes.imshow(certainty, aspect="auto", cmap="viridis", vmin=0, vmax=1, origin="lower")
    for (layer, position), token in np.ndenumerate(ids):
        color = "black" if certainty[layer, position] > 0.6 else "white"
        text = repr(words[int(token)])[1:-1].replace("$", r"\$")
        axes.text(position, layer, text, ha="center", va="center", fontsize=6, color=color)
    axes.set_xticks(range(len(tokens)), [repr(token)[1:-1] for token in tokens], fontsize=8)
    axes.set(ylabel="layer", title="Logit lens: the leading next token after each layer")
    figure.colorbar(image, label="probability")
    figure.savefig(path, dpi=130, bbox_inches="tight")


async def main(output: Path) -> None:
    async with connect("local:demo") as first:
        print(f"{first.tree.id} is served at {first.url}")
        async with connect(first.url) as second, connect(first.url) as third:
            work = {
                "Ada, logit lens": logit_lens(first, output),
                "Ben, activation patching": activation_patching(second),
                "Cleo, zero-ablation": zero_ablation(third),
            }
            findings = await asyncio.gather(*work.values())
    requests, forwards = 0, set()
    for name, (found, used) in zip(work, findings, strict=True):
        print(f"\n{name}: {len(used)} requests\n    {found}")
        requests += len(used)
        forwards |= set(used)
    print(f"\n{requests} requests of three researchers ran in {len(forwards)} forward passes.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    asyncio.run(main(output))
