"""How tokens are to be chosen, as a user says it, checked before anything is sent."""

from __future__ import annotations

import operator
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import msgspec

from ndif_client.errors import GraphError, graph_error
from ndif_client.wire.messages import Decoding
from ndif_client.wire.tensors import is_array

#: Bits of a seed that nobody chose: as many as the wire takes.
_SEED_BITS = 62

#: Where msgspec says which field is meant: "... - at `$.stop[0]`".
_FIELD = re.compile(r" - at .*?`\$\.(\w+).*$")


class DecodingOptions(TypedDict, total=False):
    """The arguments of `Session.generate` that say how tokens are chosen."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float
    seed: int | None
    stop: str | Sequence[str]
    eos: int | Sequence[int] | bool | None
    bad_words: str | Sequence[str | Sequence[int]]
    logit_bias: Mapping[int, float] | None


def as_decoding(options: DecodingOptions) -> Decoding:
    """Return the wire form of the options.

    Raises:
        GraphError: one of them has a value that it can't have; it names the option.
    """
    values: dict[str, Any] = {name: _plain(value) for name, value in options.items()}
    sampled = any(values.get(name) is not None for name in ("top_k", "top_p", "min_p"))
    if values.get("temperature") is None:
        values["temperature"] = 1.0 if sampled else 0.0
    if values.get("seed") is None:
        values["seed"] = secrets.randbits(_SEED_BITS)
    values["stop"] = _several("stop", values.get("stop", ()))
    values["bad_words"] = _several("bad_words", values.get("bad_words", ()))
    values["eos"] = _eos(values.get("eos"))
    values["logit_bias"] = _biases(values.get("logit_bias"))
    try:
        decoding = msgspec.convert(values, Decoding)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), values) from None
    if decoding.min_new_tokens > decoding.max_new_tokens:
        raise graph_error(
            f"min_new_tokens={decoding.min_new_tokens} is more than "
            f"max_new_tokens={decoding.max_new_tokens}"
        )
    return decoding


def as_seed(seed: int | None) -> int:
    """Return a seed, drawn if none is given.

    Raises:
        GraphError: it is no number that can be one.
    """
    if seed is None:
        return secrets.randbits(_SEED_BITS)
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise graph_error(f"seed={seed!r:.80} can't be: a seed is a number")
    number = operator.index(seed)
    if not 0 <= number < 1 << _SEED_BITS:
        raise graph_error(f"seed={number} can't be: it is from 0 to 2**{_SEED_BITS} - 1")
    return number


def _plain(value: Any) -> Any:
    """Return numbers and arrays of numpy and torch as Python's own."""
    if is_array(value) or type(value).__module__ == "numpy":
        return value.tolist()
    if isinstance(value, list | tuple | range | set | frozenset):
        return [_plain(item) for item in value]
    return value


def _several(name: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise graph_error(f"{name} is a text or a list of them, not {type(value).__name__}")
    return value


def _eos(value: Any) -> list[Any] | None:
    if value is True:
        raise graph_error("eos=True: None is for the model's own, False for none, or give ids")
    if value is None or isinstance(value, list):
        return value
    return [] if value is False else [value]


def _biases(value: Any) -> dict[Any, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise graph_error(
            f"logit_bias maps token ids to what is added, it can't be {type(value).__name__}"
        )
    biases = {_plain(token): _plain(bias) for token, bias in value.items()}
    if any(bias != bias for bias in biases.values()):
        raise graph_error("logit_bias has a NaN")
    return biases


def _refusal(problem: str, values: Mapping[str, Any]) -> GraphError:
    found = _FIELD.search(problem)
    if found is None:
        return graph_error(problem)
    name, what = found[1], problem[: found.start()].replace("`", "")
    return graph_error(f"{name}={values[name]!r:.80} can't be: {what[:1].lower()}{what[1:]}")
