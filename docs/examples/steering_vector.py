"""A steering vector from contrast pairs: make the model agree.

The mean difference of the residual stream between two answers to the same questions is added while
it generates (Rimsky et al. 2023, "Steering Llama 2 via Contrastive Activation Addition").

    python docs/examples/steering_vector.py [URL]            # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

LIKED = ["I love this place", "What a wonderful day", "The food was delicious", "I am so happy"]
HATED = ["I hate this place", "What an awful day", "The food was disgusting", "I am so angry"]
LAYER, STRENGTH = 14, 6.0

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    with session.trace() as trace:
        with trace.invoke(LIKED):
            liked = model.layers[LAYER].resid[:, -1].float()
        with trace.invoke(HATED):
            hated = model.layers[LAYER].resid[:, -1].float()
        difference = (liked - hated).mean(0)
        direction = (difference / difference.norm()).keep("liking")
    with session.together():
        generations = {}
        for strength in (-STRENGTH, 0.0, STRENGTH):
            with session.generate("I think that", max_new_tokens=12) as gen, gen.all():
                stream = model.layers[LAYER].resid
                scale = stream.float().norm(dim=-1, keepdim=True) * strength / 20
                model.layers[LAYER].resid = stream + (direction * scale).to(session.tree.dtype)
            generations[strength] = gen
    for strength, gen in generations.items():
        print(f"  {strength:+4.1f}  {gen.result.text!r}")
