"""Attention patterns: where does each head look from the last token?

python docs/examples/attention_pattern.py [URL]          # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

PROMPT = "When Mary and John went to the store, John gave a drink to"
LAYER = 16

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    with session.trace(PROMPT) as trace:
        trace.pattern = session.model.layers[LAYER].attn.pattern[0].float()
    result = trace.result
    print(f"layer {LAYER}, from the last token of {PROMPT!r}:")
    for head, rows in enumerate(result.pattern):
        weights, places = rows[-1].topk(3)
        looked = [
            f"{result.tokens[int(place)]!r} {float(weight):.2f}"
            for weight, place in zip(weights, places, strict=True)
        ]
        print(f"  head {head}  {', '.join(looked)}")
    # Each row is a distribution over what came before.
    print(f"rows add up to {float(result.pattern.sum(-1).mean()):.3f}")
