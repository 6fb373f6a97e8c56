"""pyvene, whose interventions are configured, on a model in the user's own process."""

from __future__ import annotations

import pyvene
import torch
from parts import array, ids_of, load
from sharing import one_at_a_time

PACKAGES = ["pyvene", "torch", "transformers"]


class Pyvene:
    def __init__(self, folder, dtype):
        self.model = load(folder, dtype)
        self.made = {}

    def run(self, request):
        with torch.no_grad():
            return getattr(self, request["scenario"].replace("-", "_"))(request)

    def hidden_states(self, request):
        tokens = request["tokens"]
        intervenable = self._intervenable(request["layer"], pyvene.CollectIntervention)
        (_, collected), _ = intervenable(
            base=_inputs(tokens), unit_locations={"base": [[list(range(len(tokens)))]]}
        )
        return array(collected[0])

    def patching(self, request):
        intervenable = self._intervenable(request["layer"], pyvene.VanillaIntervention)
        source, base = len(request["other"]) - 1, len(request["tokens"]) - 1
        _, patched = intervenable(
            base=_inputs(request["tokens"]),
            sources=[_inputs(request["other"])],
            unit_locations={"sources->base": ([[[source]]], [[[base]]])},
        )
        return array(patched.logits[:, -1])

    def _intervenable(self, layer, kind):
        """Return the wrapper of one layer, which is made once."""
        if (layer, kind) not in self.made:
            config = {"layer": layer, "component": "block_output", "intervention_type": kind}
            self.made[layer, kind] = pyvene.IntervenableModel(config, model=self.model)
        return self.made[layer, kind]


def _inputs(tokens):
    ids = ids_of(tokens)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def make(folder, dtype):
    return one_at_a_time(Pyvene(folder, dtype).run)
