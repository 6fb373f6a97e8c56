"""Logit lens: what would the model say if it stopped after each layer?

python docs/examples/logit_lens.py [URL]        # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

PROMPT = "The Eiffel Tower is in the city of"

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    with session.trace(PROMPT) as trace:
        guesses = [
            model.lm_head(model.model.norm(layer.output))[0, -1].argmax(-1).save()
            for layer in model.model.layers
        ]
    print(f"{PROMPT!r} goes on, read after each layer:")
    for number, guess in enumerate(guesses):
        print(f"  layer {number:2d}  {session.decode([int(guess.value)])!r}")
