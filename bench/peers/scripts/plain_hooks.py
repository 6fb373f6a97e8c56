"""Plain PyTorch hooks on a model of transformers, in the user's own process."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from parts import array, direction, first, ids_of, layers_of, load, norm_of
from sharing import one_at_a_time

PACKAGES = ["torch", "transformers"]


class PlainHooks:
    def __init__(self, folder, dtype):
        self.model = load(folder, dtype)
        self.layers = layers_of(self.model)

    def run(self, request):
        with torch.set_grad_enabled(request["scenario"] == "attribution"):
            return getattr(self, request["scenario"].replace("-", "_"))(request)

    def hidden_states(self, request):
        return array(self._outputs([request["layer"]], request["tokens"])[0])

    def heavy_saves(self, request):
        saved = self._outputs(range(len(self.layers)), request["tokens"])
        return [array(one) for one in saved]

    def logit_lens(self, request):
        saved = self._outputs(range(len(self.layers)), request["tokens"])
        norm, head = norm_of(self.model), self.model.lm_head
        return [int(head(norm(one[:, -1:])).argmax(-1)) for one in saved]

    def patching(self, request):
        clean = self._outputs([request["layer"]], request["other"])[0][:, -1]

        def patch(module, args, output):
            first(output)[:, -1] = clean

        with hooked(self.layers[request["layer"]], patch):
            return array(self.model(ids_of(request["tokens"]), use_cache=False).logits[:, -1])

    def steering(self, request):
        vector = direction(request, self.model)

        def steer(module, args, output):
            first(output).add_(vector)

        ids = ids_of(request["tokens"])
        count = request["new_tokens"]
        with hooked(self.layers[request["layer"]], steer):
            made = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                pad_token_id=0,
                eos_token_id=None,
            )
        return made[0, ids.shape[1] :].tolist()

    def attribution(self, request):
        embedded = []

        def watch(module, args, output):
            embedded.append(output.detach().requires_grad_())
            return embedded[0]

        with hooked(self.model.get_input_embeddings(), watch):
            logits = self.model(ids_of(request["tokens"]), use_cache=False).logits
        (gradient,) = torch.autograd.grad(logits[0, -1].max(), embedded)
        return array((gradient * embedded[0])[0].sum(-1))

    def _outputs(self, numbers_of_layers, tokens):
        kept = []
        hooks = [
            self.layers[number].register_forward_hook(lambda m, a, out: kept.append(first(out)))
            for number in numbers_of_layers
        ]
        self.model(ids_of(tokens), use_cache=False)
        for hook in hooks:
            hook.remove()
        return kept


@contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def make(folder, dtype):
    return one_at_a_time(PlainHooks(folder, dtype).run)
