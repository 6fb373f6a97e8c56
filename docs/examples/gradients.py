"""Gradients: which tokens is the answer sensitive to?

The gradient of a logit at the embeddings, times the embedding, is a first estimate of what each
token adds (Simonyan et al. 2013).

    python docs/examples/gradients.py [URL]                  # without a URL: a private server
"""

from __future__ import annotations

import sys

from ndif_client.blocking import connect

PROMPT = "The Eiffel Tower is in the city of"

with connect(sys.argv[1] if len(sys.argv) > 1 else "local:demo") as session:
    model = session.model
    (paris,) = session.tokenize(" Paris").ids
    with session.trace(PROMPT) as trace:
        embedded = model.embed.output
        logit = model.unembed.output[0, -1, paris]
        logit.backward()
        trace.norms = embedded.grad[0].float().norm(dim=-1)
        trace.shares = (embedded.grad * embedded)[0].float().sum(-1)
    result = trace.result
    print(f"d logit(Paris) / d embedding of each token of {PROMPT!r}")
    for token, norm, share in zip(result.tokens, result.norms, result.shares, strict=True):
        print(f"  {token!r:10s} norm {float(norm):8.2f}, times embedding {float(share):+7.2f}")
