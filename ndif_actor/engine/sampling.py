"""How the next token of a sequence is chosen from its logits.

The processors are transformers' own, in the order its `generate` applies them. The noise of a
sample depends on the request's seed, the sequence and the step alone, so nobody's tokens depend
on who shares the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ndif_client.wire.messages import Decoding


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        decoding: how, with `eos`, `bad_words` and `logit_bias` as ids.
        sequence: its number in the request.
        prompt_length: tokens of its prompt.
        device: where the logits will be.
    """

    def __init__(
        self, decoding: Decoding, sequence: int, prompt_length: int, device: torch.device
    ) -> None:
        self._decoding = decoding
        self._sequence = sequence
        self._device = device
        self._processors = _processors(decoding, prompt_length, device)

    @property
    def takes_the_largest(self) -> bool:
        """Whether the token is simply the one with the largest logit."""
        return self._decoding.temperature == 0 and not self._processors

    def choose(self, logits: torch.Tensor, ids: Sequence[int], step: int) -> torch.Tensor:
        """Return the next token's id, int64 without dimensions.

        Args:
            logits: `[vocabulary]`, in any precision.
            ids: all tokens of the sequence so far, the prompt included.
            step: how many tokens it has generated.
        """
        scores = logits.float()[None]
        if self._processors:
            known: Any = torch.tensor([ids], device=self._device)
            # A copy: a processor may write into what it is given.
            scores = self._processors(known, scores.clone())
        if self._decoding.temperature == 0:
            return scores[0].argmax()
        generator = torch.Generator(self._device).manual_seed(self._noise_seed(step))
        waiting = torch.empty_like(scores).exponential_(generator=generator)
        # The first of exponential clocks to ring, with these rates, is a sample (Gumbel-max trick).
        return (scores.softmax(-1) / waiting)[0].argmax()

    def _noise_seed(self, step: int) -> int:
        entropy = [self._decoding.seed, self._sequence, step]
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def choose_all(
    samplers: Sequence[Sampler],
    logits: torch.Tensor,
    ids: Sequence[Sequence[int]],
    steps: Sequence[int],
) -> torch.Tensor:
    """Return the next token of several sequences, `[sequences]` int64.

    Args:
        samplers: one a sequence.
        logits: `[sequences, vocabulary]`.
        ids: all tokens so far of each.
        steps: how many tokens each has generated.
    """
    chosen = logits.argmax(-1)
    for row, sampler in enumerate(samplers):
        if not sampler.takes_the_largest:
            chosen[row] = sampler.choose(logits[row], ids[row], steps[row])
    return chosen


def _processors(
    decoding: Decoding, prompt_length: int, device: torch.device
) -> LogitsProcessorList:
    found = LogitsProcessorList()
    eos = list(decoding.eos or ())
    if decoding.logit_bias:
        biases: Any = [[[token], float(bias)] for token, bias in decoding.logit_bias.items()]
        found.append(SequenceBiasLogitsProcessor(sequence_bias=biases))
    if decoding.repetition_penalty != 1.0:
        found.append(RepetitionPenaltyLogitsProcessor(penalty=decoding.repetition_penalty))
    if decoding.bad_words:
        words = [list(word) for word in decoding.bad_words if not isinstance(word, str)]
        found.append(NoBadWordsLogitsProcessor(words, eos or None))
    if decoding.min_new_tokens and eos:
        found.append(
            MinNewTokensLengthLogitsProcessor(
                prompt_length, decoding.min_new_tokens, eos, device=str(device)
            )
        )
    if decoding.temperature == 0:
        return found
    if decoding.temperature != 1.0:
        found.append(TemperatureLogitsWarper(decoding.temperature))
    if decoding.top_k is not None:
        found.append(TopKLogitsWarper(top_k=decoding.top_k))
    if decoding.top_p is not None and decoding.top_p < 1.0:
        found.append(TopPLogitsWarper(top_p=decoding.top_p))
    if decoding.min_p is not None:
        found.append(MinPLogitsWarper(min_p=decoding.min_p))
    return found
