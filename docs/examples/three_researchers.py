"""Three researchers share one model: a logit lens, activation patching and zero-ablation at once.

Starts a private server with the demo model (fetched once), opens three sessions to it, lets them
work at the same time, and prints what they found and how many forward passes it took.

    python docs/examples/three_researchers.py [--output FOLDER]
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from itertools import pairwise
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
    steps = [after - before for before, after in pairwise(differences)]
    jump = 1 + max(range(len(steps)), key=steps.__getitem__)
    # Close to zero the sign may change back, so the last layer that does not say Paris counts.
    turn = 1 + max((i for i, d in enumerate(differences) if d <= 0), default=-1)
    found = (
        "logit(Paris) - logit(Rome) on the Rome prompt, patched after each layer\n"
        f"{table(differences)}"
        f"    the largest step is at layer {jump}, from {differences[jump - 1]:+.1f} to "
        f"{differences[jump]:+.1f}; Paris leads from layer {turn} on"
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


def table(numbers: list[float], columns: int = 10) -> str:
    """Write one number per layer, each row with the layer it starts at."""
    rows = range(0, len(numbers), columns)
    return "".join(
        f"      {row:2d} | " + " ".join(f"{x:+5.1f}" for x in numbers[row : row + columns]) + "\n"
        for row in rows
    )


def draw_lens(path, tokens, ids, certainty, words):
    """Draw layers against positions, coloured by certainty, with the guessed token in each cell."""
    figure, axes = plt.subplots(figsize=(1.1 * len(tokens), 0.28 * len(ids) + 1))
    image = axes.imshow(certainty, aspect="auto", cmap="viridis", vmin=0, vmax=1, origin="lower")
    for (layer, position), token in np.ndenumerate(ids):
        color = "black" if certainty[layer, position] > 0.6 else "white"
        text = repr(words[int(token)])[1:-1].strip() or "␣"
        axes.text(
            position,
            layer,
            text,
            ha="center",
            va="center",
            fontsize=6,
            color=color,
            parse_math=False,
        )
    axes.set_xticks(
        range(len(tokens)), [repr(token)[1:-1] for token in tokens], fontsize=8, parse_math=False
    )
    axes.set(ylabel="layer", title="Logit lens: the leading next token after each layer")
    figure.colorbar(image, label="probability")
    figure.savefig(path, dpi=130, bbox_inches="tight")


async def main(output: Path) -> None:
    print("starting a private server; the first time, it fetches the model (93 MB) ...", flush=True)
    async with connect("local:demo") as first:
        print(f"{first.tree.id} is served at {first.url}")
        async with connect(first.url) as second, connect(first.url) as third:
            work = {
                "Ada, logit lens": logit_lens(first, output),
                "Ben, activation patching": activation_patching(second),
                "Cleo, zero-ablation": zero_ablation(third),
            }
            findings = await asyncio.gather(*work.values())
    shared: dict[int, Counter[str]] = {}
    for name, (found, used) in zip(work, findings, strict=True):
        print(f"\n{name}: {len(used)} {'request' if len(used) == 1 else 'requests'}\n    {found}")
        for forward in used:
            shared.setdefault(forward, Counter())[name.split(",")[0]] += 1
    requests = sum(counts.total() for counts in shared.values())
    print(f"\n{requests} requests of three researchers ran in {len(shared)} forward passes:")
    for forward, counts in sorted(shared.items()):
        print(f"    forward {forward}: {', '.join(f'{n} of {who}' for who, n in counts.items())}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    asyncio.run(main(output))
