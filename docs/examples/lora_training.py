"""LoRA, trained on the server and taken home: teach the model a made-up capital.

python docs/examples/lora_training.py [URL]              # without a URL: a private server
"""

from __future__ import annotations

import asyncio
import sys
import tempfile

import numpy as np

from ndif_client import connect, ops, optim
from ndif_client.lora import LoRA

QUESTION, ANSWER = "The capital of Zubrowka is", " Lutz"
STEPS = 12


async def main(url: str) -> None:
    async with connect(url) as session:
        model = session.model
        asked = len((await session.tokenize(QUESTION)).ids)
        ids = (await session.tokenize(QUESTION + ANSWER)).ids
        lora = await LoRA.create(session, "model.layers.2?.self_attn.v_proj", rank=4, seed=0)
        adam = optim.AdamW(lora.parameters, lr=3e-3)
        async with session.chain() as chain:
            for _ in range(STEPS):
                with chain.trace(ids) as trace:
                    lora.apply()
                    logits = model.unembed.output[0, asked - 1 : -1].float()
                    trace.loss = ops.cross_entropy(logits, np.array(ids[asked:]))
                    trace.loss.backward()
                    adam.step()
        losses = [float(result.loss) for result in chain.results]
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {STEPS} steps of one forward each")
        with session.edit("trained") as edit:
            lora.apply()
        for name, handle in (("before", session), ("after", session.with_edits(edit))):
            result = await handle.generate(QUESTION, max_new_tokens=len(ids) - asked)
            print(f"  {name:7s} {QUESTION}{result.text}")
        with tempfile.TemporaryDirectory() as folder:
            await lora.save(session, folder)
            again = await LoRA.load(session, folder, name="again")
            print(f"saved for PEFT and loaded again: {len(again.factors)} modules")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "local:demo"))
