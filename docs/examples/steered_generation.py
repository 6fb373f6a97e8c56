"""Steering while the model writes: one prompt, several strengths, all in the same forwards.

The direction is the difference of two means in the residual stream (Turner et al. 2023, "Activation
addition"); it is added at every step, the prompt's included.

python docs/examples/steered_generation.py [URL]        # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

PROMPT = "I went to the new restaurant yesterday. The food was"
GLAD = [
    "This was wonderful, I loved it",
    "What a great and happy day",
    "Excellent, delicious, the best",
]
SAD = ["This was terrible, I hated it", "What a bad and sad day", "Awful, disgusting, the worst"]
LAYER, STRENGTHS = 12, (-6.0, -3.0, 0.0, 3.0, 6.0)

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    layer = session.model.model.layers[LAYER]
    with session.trace() as trace:
        means = []
        for texts in (GLAD, SAD):
            streams = []
            for text in texts:
                with trace.invoke(text):
                    streams.append(layer.output[0, -1])
            means.append(sum(streams[1:], streams[0]) / len(texts))
        direction = means[0] - means[1]
        trace.direction = direction / direction.norm()
        trace.scale = means[0].norm()
    unit = trace.result.direction * float(trace.result.scale) / 10

    generations = []
    with session.together():
        for strength in STRENGTHS:
            generation = session.generate(PROMPT, max_new_tokens=16)
            with generation, generation.all():
                layer.output[:] += strength * unit
            generations.append(generation)
    print(f"{PROMPT!r} goes on, steered after layer {LAYER}:")
    for strength, generation in zip(STRENGTHS, generations, strict=True):
        print(f"  {strength:+.0f}  {generation.result.text!r}")
    forwards = {generation.result.statistics.forward for generation in generations}
    print(f"{len(generations)} generations began in {len(forwards)} forward(s)")
