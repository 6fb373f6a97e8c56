"""Patchscopes: ask the model itself what one of its states means.

A state of one prompt is put into a prompt that asks to go on with it (Ghandeharioun et al. 2024).

    python docs/examples/patchscopes.py [URL]                # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

SOURCE = "The Eiffel Tower is in the city of Paris, the capital of"
TARGET = "cat -> cat\n1135 -> 1135\nhello -> hello\n? ->"
LAYERS = (2, 8, 14, 20, 26)

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    tokens = session.tokenize(SOURCE).tokens
    source = max(place for place, token in enumerate(tokens) if "Paris" in token)
    place = max(n for n, token in enumerate(session.tokenize(TARGET).tokens) if "?" in token)
    with session.trace() as trace:
        with trace.invoke(SOURCE):
            states = {n: model.layers[n].resid[:, source] for n in LAYERS}
        guesses = {}
        for n in LAYERS:
            with trace.invoke(TARGET):
                model.layers[2].resid[:, place] = states[2]
                if n != 2:
                    model.layers[n].resid[:, place] = states[n]
                guesses[str(n)] = model.unembed.output[0, -1].topk(3).indices
        trace.guesses = guesses
    print(f"the state of {tokens[source]!r}, put into a prompt that repeats:")
    for n, ids in trace.result.guesses.items():
        print(f"  after layer {n:2s}  {[session.decode([int(i)]) for i in ids]}")
