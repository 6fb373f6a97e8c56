"""Induction heads: which heads look back to what followed the same token before?

On a random sequence that is repeated, an induction head at a token attends to the token after its
first occurrence (Olsson et al. 2022).

    python docs/examples/induction_heads.py [URL]            # without a URL: a private server
"""

from __future__ import annotations

import random
import sys

from ndif_client.blocking import connect

LENGTH = 24

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    generator = random.Random(0)
    half = [generator.randrange(1000, session.tree.vocab_size) for _ in range(LENGTH)]
    with session.trace([half + half]) as trace:
        # From position LENGTH + i to position i + 1: a diagonal of the pattern.
        trace.scores = [
            layer.attn.pattern[0, :, LENGTH:, 1 : LENGTH + 1].diagonal(0, -2, -1).float().mean(-1)
            for layer in session.model.layers
        ]
    scores = {
        (layer, head): float(score)
        for layer, heads in enumerate(trace.result.scores)
        for head, score in enumerate(heads)
    }
    print("induction score: mean attention to the token after the first occurrence")
    best = sorted(scores.items(), key=lambda item: -item[1])[:6]
    for (layer, head), score in best:
        print(f"  layer {layer:2d}, head {head}: {score:.2f}")
