"""Function vectors: a task, taken from examples, works without them.

The mean state at the end of prompts that show a task is added to a prompt that does not
(Todd et al. 2023, "Function Vectors in Large Language Models").

    python docs/examples/function_vectors.py [URL]           # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

SHOWN = [
    "hot -> cold\nbig -> small\nup -> down\nfast ->",
    "day -> night\nopen -> closed\nhappy -> sad\nrich ->",
    "left -> right\ntrue -> false\nfull -> empty\nold ->",
    "wet -> dry\nlight -> dark\nin -> out\nhard ->",
]
PLAIN = ["fly -> fly\nsea -> sea\ntall -> tall\nearly ->", "car -> car\nred -> red\nlow ->"]
LAYER = 14

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    with session.trace() as trace:
        with trace.invoke(SHOWN):
            shown = model.layers[LAYER].resid[:, -1].mean(0)
        with trace.invoke(PLAIN):
            copying = model.layers[LAYER].resid[:, -1].mean(0)
        task = shown - copying
        before, after = [], []
        for prompt in PLAIN:
            with trace.invoke(prompt):
                before.append(model.unembed.output[0, -1].topk(4).indices)
            with trace.invoke(prompt):
                model.layers[LAYER].resid[:, -1] += task
                after.append(model.unembed.output[0, -1].topk(4).indices)
        trace.before, trace.after = before, after
    for prompt, plain, changed in zip(PLAIN, trace.result.before, trace.result.after, strict=True):
        print(f"  {prompt.splitlines()[-1]}")
        for name, ids in (("before", plain), ("with 'opposite'", changed)):
            print(f"    {name:16s} {[session.decode([int(i)]) for i in ids]}")
