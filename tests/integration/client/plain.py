"""A model of transformers with PyTorch's own hooks: what programs are compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, DynamicCache

Post = Callable[[torch.Tensor], torch.Tensor | None]
#: Takes the number of a layer and what passes there; returns what is to follow.
Attended = Callable[[int, torch.Tensor], torch.Tensor]
Hooks = Sequence[tuple[torch.nn.Module, Post]]


class Plain:
    """A model of transformers with hooks set by hand, in float64."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.model.requires_grad_(False)
        if self.model.get_experts_implementation()[""] is not None:
            self.model.set_experts_implementation("eager")
        is_gpt2 = hasattr(self.model, "transformer")
        base = self.model.transformer if is_gpt2 else self.model.model
        self.layers = base.h if is_gpt2 else base.layers
        self.norm = base.ln_f if is_gpt2 else base.norm
        self.embed = self.model.get_input_embeddings()
        self.heads = self.model.config.num_attention_heads

    def attention(self, layer: int) -> torch.nn.Module:
        block = self.layers[layer]
        found: torch.nn.Module = block.attn if hasattr(block, "attn") else block.self_attn
        return found

    def projection(self, layer: int) -> torch.nn.Module:
        attention: Any = self.attention(layer)
        found: torch.nn.Module = (
            attention.c_proj if hasattr(attention, "c_proj") else attention.o_proj
        )
        return found

    def run(
        self,
        ids: Sequence[int],
        *,
        post: Hooks = (),
        pre: Hooks = (),
        grad: bool = False,
        cache: DynamicCache | None = None,
    ) -> torch.Tensor:
        """Return a prompt's logits; hooks may change the first tensor that leaves or enters."""
        with ExitStack() as stack, torch.set_grad_enabled(grad):
            for module, change in post:
                stack.callback(module.register_forward_hook(_post(change)).remove)
            for module, change in pre:
                hook = module.register_forward_pre_hook(_pre(change), with_kwargs=True)
                stack.callback(hook.remove)
            kept: dict[str, Any] = {"use_cache": cache is not None, "past_key_values": cache}
            logits: torch.Tensor = self.model(torch.tensor([list(ids)]), **kept).logits
        return logits

    def generate(
        self,
        ids: Sequence[int],
        steps: int,
        post: Callable[[int], Hooks] = lambda step: (),
        pre: Callable[[int], Hooks] = lambda step: (),
    ) -> list[int]:
        """Return so many tokens, each the likeliest; the hooks of a step are there only in it."""
        cache, fed, tokens = DynamicCache(config=self.model.config), list(ids), []
        for step in range(steps):
            logits = self.run(fed, post=post(step), pre=pre(step), cache=cache)
            fed = [int(logits[0, -1].argmax())]
            tokens += fed
        return tokens

    def streams(self, ids: Sequence[int], **options: Any) -> list[torch.Tensor]:
        """Return the residual stream after each layer."""
        kept: list[torch.Tensor] = []
        post = [*options.pop("post", ()), *((layer, kept.append) for layer in self.layers)]
        self.run(ids, post=post, **options)
        return kept

    def patterns(self, ids: Sequence[int]) -> list[torch.Tensor]:
        """Return what each layer's heads attend to: `[1, heads, tokens, tokens]`."""
        seen: list[torch.Tensor] = []

        def look(layer: int, pattern: torch.Tensor) -> torch.Tensor:
            seen.append(pattern)
            return pattern

        self.attend(ids, pattern=look)
        return seen

    def attend(
        self,
        ids: Sequence[int],
        *,
        scores: Attended = lambda layer, value: value,
        pattern: Attended = lambda layer, value: value,
        **options: Any,
    ) -> torch.Tensor:
        """Return a prompt's logits; the scores and patterns of each layer may be changed."""
        softmax, layers = torch.nn.functional.softmax, itertools.count()

        def seen(value: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
            if value.dim() != 4:
                return softmax(value, dim, dtype=dtype)
            layer = next(layers)
            # transformers computes attention's in float32, whatever the model's dtype.
            return pattern(layer, softmax(scores(layer, value), dim))

        self.model.set_attn_implementation("eager")
        try:
            with mock.patch("torch.nn.functional.softmax", seen):
                return self.run(ids, **options)
        finally:
            self.model.set_attn_implementation("sdpa")

    def lens(self, stream: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.lm_head(self.norm(stream))
        return logits


def _post(change: Post) -> Any:
    def hook(module: Any, args: Any, output: Any) -> Any:
        changed = change(output[0] if isinstance(output, tuple) else output)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _pre(change: Post) -> Any:
    def hook(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            changed = change(args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        changed = change(kwargs["hidden_states"])
        return None if changed is None else (args, {**kwargs, "hidden_states": changed})

    return hook


def changed(tensor: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """Return a copy with something else at `index`."""
    copy = tensor.clone()
    copy[index] = value
    return copy
