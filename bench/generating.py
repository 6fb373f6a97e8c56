"""What generation is compared with: bare `transformers.generate`, one prompt at a time or padded.

Lives in a process of its own (`worker.Worker`) with torch's own settings, and uses nothing of this
project but the folder of the model.
"""

from __future__ import annotations

import time
from typing import Any


class BareGenerator:
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
        # Nothing ends a sequence early, as with eos=False on the server's side.
        self._model.generation_config.eos_token_id = None
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def one_after_another(self, prompts: list[str], steps: int) -> float:
        """Generate after each prompt by itself; return the seconds of all, without tokenisation."""
        encoded = [self._tokenizer(prompt, return_tensors="pt") for prompt in prompts]
        began = time.perf_counter()
        for each in encoded:
            self._generate(each, steps)
        return time.perf_counter() - began

    def padded(self, prompts: list[str], steps: int) -> float:
        """Generate after all prompts as one left-padded batch; return the seconds."""
        encoded = self._tokenizer(prompts, return_tensors="pt", padding=True)
        began = time.perf_counter()
        self._generate(encoded, steps)
        return time.perf_counter() - began

    def tokens(self, prompt: str, steps: int) -> list[int]:
        """Return the tokens generated after a prompt."""
        encoded = self._tokenizer(prompt, return_tensors="pt")
        made: list[int] = self._generate(encoded, steps)[0, encoded.input_ids.shape[1] :].tolist()
        return made

    def _generate(self, encoded: Any, steps: int) -> Any:
        with self._torch.inference_mode():
            return self._model.generate(
                **encoded,
                max_new_tokens=steps,
                do_sample=False,
                pad_token_id=0,
            )
