"""Zero-ablation: which tokens lead when a layer's attention or MLP adds nothing?

python docs/examples/ablation.py [URL]        # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

PROMPT = "The Eiffel Tower is in the city of"
LAYER = 0

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    layer = session.model.model.layers[LAYER]
    # The modules whose output is added to the residual stream.
    silenced = {"nothing": None, "its attention": layer.self_attn.o_proj, "its MLP": layer.mlp}
    traces = {}
    with session.together():
        for name, module in silenced.items():
            with session.trace(PROMPT) as trace:
                if module is not None:
                    module.output[:] = 0
                leading = session.model.lm_head.output[0, -1].softmax(-1).topk(5)
                trace.ids, trace.probabilities = leading.indices, leading.values
            traces[name] = trace
    print(f"{PROMPT!r} goes on, with this of layer {LAYER} silenced:")
    for name, trace in traces.items():
        words = [session.decode([int(token)]) for token in trace.result.ids]
        print(
            f"  {name:14s} {words}, the first with p = {float(trace.result.probabilities[0]):.3f}"
        )
