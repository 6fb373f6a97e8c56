"""What everything is compared with: bare transformers and a forward hook, one prompt at a time.

Lives in a process of its own (`worker.Worker`) with torch's own settings, and uses nothing of this
project but the folder of the model.
"""

from __future__ import annotations

import time
from typing import Any

from bench.prompts import Request


class BareModel:
    """A model as a researcher alone would load it.

    Args:
        folder: with safetensors weights and a tokenizer.
        dtype: "bfloat16", "float32", ...
    """

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._model.eval()  # type: ignore[no-untyped-call]
        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def num_layers(self) -> int:
        """Return how many decoder layers there are."""
        return len(self._model.model.layers)

    def lengths(self, requests: list[Request]) -> list[int]:
        """Return the number of tokens of each prompt."""
        return [len(ids) for ids in self._tokenizer([r.prompt for r in requests]).input_ids]

    def one_after_another(self, requests: list[Request], logits: bool) -> list[float]:
        """Run each request in its own forward; return the seconds of each, without tokenisation.

        Args:
            requests: what to run.
            logits: save the logits of the last token too.
        """
        ids = self._ids(requests)
        seconds = []
        for each, request in zip(ids, requests, strict=True):
            began = time.perf_counter()
            self._run(each, request.layer, logits)
            seconds.append(time.perf_counter() - began)
        return seconds

    def touching(self, request: Request, places: list[tuple[str, str]], kind: str) -> float:
        """Run a request with hooks on modules; return its seconds.

        Args:
            request: its layer doesn't matter.
            places: modules, each with "input" or "output".
            kind: "saved" to take a number out of each value, anything else to do nothing.
        """
        kept: list[Any] = []

        def touch(value: Any) -> None:
            kept.append(value[..., 0, 0].clone() if kind == "saved" else value)

        def before(module: Any, inputs: Any) -> None:
            touch(inputs[0])

        def after(module: Any, inputs: Any, output: Any) -> None:
            touch(output if isinstance(output, self._torch.Tensor) else output[0])

        (ids,) = self._ids([request])
        hooks = []
        began = time.perf_counter()
        for path, port in places:
            module = self._model.get_submodule(path)
            if port == "input":
                hooks.append(module.register_forward_pre_hook(before))
            else:
                hooks.append(module.register_forward_hook(after))
        with self._torch.inference_mode():
            self._model(ids)
        for hook in hooks:
            hook.remove()
        return time.perf_counter() - began

    def saved(self, request: Request) -> list[float]:
        """Return the values that a request saves, flattened."""
        (ids,) = self._ids([request])
        hidden: Any = self._run(ids, request.layer, False)[0]
        flat: list[float] = hidden.float().flatten().tolist()
        return flat

    def _ids(self, requests: list[Request]) -> list[Any]:
        encoded = self._tokenizer([request.prompt for request in requests]).input_ids
        return [self._torch.tensor([ids]) for ids in encoded]

    def _run(self, ids: Any, layer: int, logits: bool) -> list[Any]:
        kept = []
        hook = self._model.model.layers[layer].register_forward_hook(
            lambda module, inputs, output: kept.append(output.clone())
        )
        with self._torch.inference_mode():
            output = self._model(ids)
            if logits:
                kept.append(output.logits[:, -1].clone())
        hook.remove()
        return kept
