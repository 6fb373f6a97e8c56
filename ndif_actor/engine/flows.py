"""Which hook points show what the model makes of its embeddings, so that autograd follows it.

What enters a module may be used by others, too: the residual stream by a norm and by the addition
after it. Its gradient is that of the tensor, from all who use it. Other inputs (rotary embeddings,
masks) are known to autograd only where somebody asks for their gradient, and have that of the
module alone. Found by running the model without weights.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ndif_actor.engine import hookpoints
from ndif_actor.engine.moments import Recording, recording_moments
from ndif_client.wire.graph import HookPoint

#: Tokens of the prompt that is run.
_TOKENS = 4


def find_flows(model: PreTrainedModel, *, packed: bool) -> frozenset[HookPoint]:
    """Return the inputs of modules and operations that autograd follows by itself.

    Args:
        model: without weights.
        packed: whether it takes prompts in one row.
    """
    found: set[HookPoint] = set()

    def keep(point: HookPoint, tensor: torch.Tensor) -> None:
        if point.port == "input" and tensor.requires_grad:
            found.add(point)

    seen: Recording = {}
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(differentiable)
    try:
        with torch.enable_grad(), recording_moments(model, seen, keep):
            hookpoints.run(model, _TOKENS, packed=packed)
    finally:
        handle.remove()
    return frozenset(found)


def differentiable(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Be the hook of an embedding: let autograd follow what the model makes of its output."""
    return output.detach().requires_grad_()
