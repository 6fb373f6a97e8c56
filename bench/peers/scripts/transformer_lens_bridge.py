"""TransformerLens, whose bridge hooks a model of transformers in the user's own process."""

from __future__ import annotations

import torch
from parts import array, direction, ids_of, load
from sharing import one_at_a_time
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

PACKAGES = ["transformer-lens", "torch", "transformers"]


class Lens:
    def __init__(self, folder, dtype):
        self.plain = load(folder, dtype)
        self.model = TransformerBridge.boot_transformers(
            folder,
            hf_model=self.plain,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            dtype=getattr(torch, dtype),
        )
        self.count = self.plain.config.num_hidden_layers

    def run(self, request):
        with torch.set_grad_enabled(request["scenario"] == "attribution"):
            return getattr(self, request["scenario"].replace("-", "_"))(request)

    def hidden_states(self, request):
        name = _stream(request["layer"])
        _, cache = self.model.run_with_cache(ids_of(request["tokens"]), names_filter=name)
        return array(cache[name])

    def heavy_saves(self, request):
        saved = self._streams(request)
        return [array(one) for one in saved]

    def logit_lens(self, request):
        saved = self._streams(request)
        norm, head = self.model.ln_final, self.model.unembed
        return [int(head(norm(one[:, -1:])).argmax(-1)) for one in saved]

    def patching(self, request):
        name = _stream(request["layer"])
        _, cache = self.model.run_with_cache(ids_of(request["other"]), names_filter=name)

        def patch(value, hook):
            value[:, -1] = cache[name][:, -1]
            return value

        logits = self.model.run_with_hooks(ids_of(request["tokens"]), fwd_hooks=[(name, patch)])
        return array(logits[:, -1])

    def steering(self, request):
        vector, count = direction(request, self.plain), request["new_tokens"]
        ids = ids_of(request["tokens"])

        def steer(value, hook):
            return value + vector

        with self.model.hooks(fwd_hooks=[(_stream(request["layer"]), steer)]):
            made = self.model.generate(
                ids,
                max_new_tokens=count,
                do_sample=False,
                stop_at_eos=False,
                verbose=False,
                return_type="tokens",
            )
        return made[0, ids.shape[1] :].tolist()

    def attribution(self, request):
        embedded = []

        def watch(value, hook):
            embedded.append(value.detach().requires_grad_())
            return embedded[0]

        logits = self.model.run_with_hooks(
            ids_of(request["tokens"]), fwd_hooks=[("hook_embed", watch)]
        )
        (gradient,) = torch.autograd.grad(logits[0, -1].max(), embedded)
        return array((gradient * embedded[0])[0].sum(-1))

    def _streams(self, request):
        names = [_stream(number) for number in range(self.count)]
        _, cache = self.model.run_with_cache(
            ids_of(request["tokens"]), names_filter=lambda name: name in names
        )
        return [cache[name] for name in names]


def _stream(layer):
    return f"blocks.{layer}.hook_resid_post"


def make(folder, dtype):
    return one_at_a_time(Lens(folder, dtype).run)
