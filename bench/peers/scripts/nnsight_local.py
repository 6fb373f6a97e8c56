"""NNsight on a model in the user's own process."""

from __future__ import annotations

import nnsight
import torch
from nnsight import LanguageModel
from parts import array, direction, ids_of, layers_of, load, norm_of
from sharing import one_at_a_time
from transformers import AutoTokenizer

PACKAGES = ["nnsight", "torch", "transformers"]


class NNsight:
    def __init__(self, folder, dtype):
        self.plain = load(folder, dtype)
        self.model = LanguageModel(self.plain, tokenizer=AutoTokenizer.from_pretrained(folder))
        self.layers, self.norm = layers_of(self.model), norm_of(self.model)

    def run(self, request):
        with torch.set_grad_enabled(request["scenario"] == "attribution"):
            return getattr(self, request["scenario"].replace("-", "_"))(request)

    def hidden_states(self, request):
        layer = self.layers[request["layer"]]
        with self.model.trace(ids_of(request["tokens"]), use_cache=False):
            hidden = layer.output.save()
        return array(hidden)

    def heavy_saves(self, request):
        with self.model.trace(ids_of(request["tokens"]), use_cache=False):
            saved = nnsight.save([layer.output for layer in self.layers])
        return [array(one) for one in saved]

    def logit_lens(self, request):
        norm, head = self.norm, self.model.lm_head
        with self.model.trace(ids_of(request["tokens"]), use_cache=False):
            saved = nnsight.save(
                [head(norm(layer.output[:, -1:])).argmax(-1) for layer in self.layers]
            )
        return [int(one) for one in saved]

    def patching(self, request):
        layer = self.layers[request["layer"]]
        with self.model.trace(ids_of(request["other"]), use_cache=False):
            clean = layer.output[:, -1].save()
        with self.model.trace(ids_of(request["tokens"]), use_cache=False):
            layer.output[:, -1] = clean
            logits = self.model.lm_head.output[:, -1].save()
        return array(logits)

    def steering(self, request):
        vector, layer = direction(request, self.plain), self.layers[request["layer"]]
        ids, count = ids_of(request["tokens"]), request["new_tokens"]
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with self.model.generate(
            ids, max_new_tokens=count, min_new_tokens=count, **options
        ) as tracer:
            for _ in tracer.iter[:count]:
                layer.output[:] += vector
            made = tracer.result.save()
        return made[0, ids.shape[1] :].tolist()

    def attribution(self, request):
        embed, head = self.model.model.embed_tokens, self.model.lm_head
        with self.model.trace(ids_of(request["tokens"]), use_cache=False):
            embedded = embed.output
            embedded.requires_grad_(True)
            top = head.output[0, -1].max()
            with top.backward():
                gradient = embedded.grad.save()
            kept = embedded.save()
        return array((gradient * kept)[0].sum(-1))


def make(folder, dtype):
    return one_at_a_time(NNsight(folder, dtype).run)
