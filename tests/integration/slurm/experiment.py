"""One small experiment, and what transformers alone makes of it.

As a program: run it at the URL given, on the model in the folder given, and compare.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ndif_client import Progress, Session, connect

_PROMPT = "The Eiffel Tower is in"


async def run_at(url: str) -> torch.Tensor:
    """Return what layer 1 puts out for the prompt, by the server at `url`."""
    async with connect(url) as session:
        return await run_in(session)


async def run_in(
    session: Session, on_progress: Callable[[Progress], None] | None = None
) -> torch.Tensor:
    """Return what layer 1 puts out for the prompt, by the server of `session`."""
    result = await session.trace(
        _PROMPT, lambda m: {"hidden": m.model.layers[1].output}, on_progress=on_progress
    )
    hidden: torch.Tensor = result["hidden"]
    return hidden


def check(hidden: torch.Tensor, model: Path) -> None:
    """Compare with plain transformers on the model in the folder `model`."""
    ids = AutoTokenizer.from_pretrained(model)(_PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        outputs = AutoModelForCausalLM.from_pretrained(model)(ids, output_hidden_states=True)
    torch.testing.assert_close(hidden, outputs.hidden_states[2], atol=1e-4, rtol=0)


if __name__ == "__main__":
    check(asyncio.run(run_at(sys.argv[1])), Path(sys.argv[2]))
