"""Direct logit attribution: which attention and MLP layers write the answer?

The residual stream is a sum, so the logit difference splits into one term for each layer's
attention and MLP, with the final norm's scale held fixed (Elhage et al. 2021).

    python docs/examples/direct_logit_attribution.py [URL]   # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

PROMPT = "The Eiffel Tower is in the city of"

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    paris, rome = (session.tokenize(city).ids[0] for city in (" Paris", " Rome"))
    with session.trace(PROMPT) as trace:
        final = model.norm.input[0, -1].float()
        scale = (final.square().mean() + 1e-5).rsqrt()
        unembed = model.unembed.weight
        direction = (unembed[paris] - unembed[rome]).float() * model.norm.weight.float() * scale

        def share(written):
            return (written.float() * direction).sum()

        trace.embedding = share(model.embed.output[0, -1])
        trace.attention = [share(layer.attn.output[0][0, -1]) for layer in model.layers]
        trace.mlp = [share(layer.mlp.output[0, -1]) for layer in model.layers]
        logits = model.unembed.output[0, -1].float()
        trace.difference = logits[paris] - logits[rome]
    result = trace.result
    parts = {f"attention {n}": float(x) for n, x in enumerate(result.attention)}
    parts |= {f"MLP {n}": float(x) for n, x in enumerate(result.mlp)}
    parts["embedding"] = float(result.embedding)
    print(f"logit(Paris) - logit(Rome) = {float(result.difference):.2f}; ", end="")
    print(f"the sum of all parts = {sum(parts.values()):.2f}")
    for name, value in sorted(parts.items(), key=lambda part: -abs(part[1]))[:8]:
        print(f"  {name:12s} {value:+6.2f}")
