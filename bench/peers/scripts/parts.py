"""The parts of a causal language model of transformers that experiments touch."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM

#: Norm of a steering vector, in times of the square root of the residual stream's width.
STRENGTH = 0.1


def load(folder, dtype):
    """Load a model that nobody will train."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def layers_of(model):
    """Return the decoder layers."""
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def norm_of(model):
    """Return the norm after the last layer."""
    return model.model.norm if hasattr(model, "model") else model.transformer.ln_f


def ids_of(tokens):
    """Return a prompt as a batch of one."""
    return torch.tensor([tokens])


def direction(request, model):
    """Return the vector that a request steers by, `[hidden]`."""
    drawn = np.random.default_rng(request["seed"]).standard_normal(model.config.hidden_size)
    return torch.from_numpy((STRENGTH * drawn).astype(np.float32)).to(model.dtype)


def first(output):
    """Return the residual stream in what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def array(tensor):
    """Return a result as a user wants it: a numpy array of float32."""
    return tensor.detach().float().cpu().numpy()
