"""The work of one round: who asks what. Random, and the same for everything compared."""

from __future__ import annotations

import random

import msgspec

#: Frequent words; with a space before it each is one token to nearly every tokenizer.
_WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will "
    "no more if out so up said what its about than into them can only other time new some could "
    "these two may first then do any like my now over such our man me even most made after also"
)

#: Tokens of a prompt, smallest and largest.
LENGTHS = (6, 12)


class Request(msgspec.Struct, frozen=True):
    """One user's prompt, and the layer whose output they save."""

    prompt: str
    layer: int


def draw(round_number: int, users: int, layers: int) -> list[Request]:
    """Return the requests of one round, the same for the same arguments."""
    # Warm-up rounds have negative numbers, and Random seeds itself with absolute values.
    chance = random.Random(f"round {round_number}")
    words, requests = _WORDS.split(), []
    for _ in range(users):
        chosen = chance.choices(words, k=chance.randint(*LENGTHS))
        requests.append(Request(" ".join(chosen), chance.randrange(layers)))
    return requests
