"""The request of a load test: a random prompt, the hidden states after a random layer.

python docs/examples/load_request.py [URL]               # without a URL: a private server
"""

from __future__ import annotations

import asyncio
import random
import sys

from ndif_client import Session, connect

USERS, TOKENS = 16, 24


async def one(session: Session, seed: int) -> tuple[int, tuple[int, ...], int]:
    """Run one request; return its layer, the shape of its result and the forward it was in."""
    generator = random.Random(seed)
    ids = [generator.randrange(session.tree.vocab_size) for _ in range(TOKENS)]
    layer = generator.randrange(session.tree.num_layers)
    async with session.trace(ids) as trace:
        trace.hidden = session.model.layers[layer].resid
    return layer, tuple(trace.result.hidden.shape), trace.result.statistics.forward


async def main(url: str) -> None:
    async with connect(url) as session:
        answers = await asyncio.gather(*(one(session, seed) for seed in range(USERS)))
    forwards = {forward for _, _, forward in answers}
    print(f"{USERS} requests ran in {len(forwards)} forward pass(es)")
    for layer, shape, _ in answers[:4]:
        print(f"  layer {layer:2d}: {shape}")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "local:demo"))
