"""Edge attribution patching: which connections between layers carry the answer?

The effect of replacing what an MLP hands to a later one is estimated by the gradient at the later
one's input, times the change of what the earlier one writes (Syed et al. 2023): one backward for
all edges.

    python docs/examples/edge_attribution.py [URL]           # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

CLEAN, CORRUPTED = "The Eiffel Tower is in the city of", "The Colosseum is in the city of"
LAYERS = range(18, 30)

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    paris, rome = (session.tokenize(city).ids[0] for city in (" Paris", " Rome"))
    with session.trace() as trace:
        with trace.invoke(CLEAN):
            clean = {n: model.layers[n].mlp.output[0, -1].float() for n in LAYERS}
        with trace.invoke(CORRUPTED):
            corrupted = {n: model.layers[n].mlp.output[0, -1].float() for n in LAYERS}
            # What enters an MLP is the normed residual stream; the edge ends before the norm. The
            # norm reads a copy, whose gradient is its own: the stream also goes past it.
            ends = {n: model.layers[n].post_attention_layernorm.input.clone() for n in LAYERS}
            for n in LAYERS:
                model.layers[n].post_attention_layernorm.input = ends[n]
            logits = model.unembed.output[0, -1].float()
            (logits[paris] - logits[rome]).backward()
        edges = {}
        for start in LAYERS:
            for end in LAYERS:
                if end > start:
                    gradient = ends[end].grad[0, -1].float()
                    edges[f"{start}->{end}"] = (gradient * (clean[start] - corrupted[start])).sum()
        trace.edges = edges
    scores = {name: float(value) for name, value in trace.result.edges.items()}
    print(f"{len(scores)} edges between MLPs, the strongest:")
    for name, score in sorted(scores.items(), key=lambda item: -abs(item[1]))[:6]:
        print(f"  {name:7s} {score:+6.2f}")
