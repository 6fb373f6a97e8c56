"""Addresses of the tensors inside what a module takes and returns.

A module's output may be one tensor (address ""), a tuple ("0", "1.0"), or a mapping ("logits");
its input is its positional and keyword arguments ("args.0", "kwargs.hidden_states").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any

import torch


def walk(structure: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of `structure` with its address, in a fixed order."""
    if isinstance(structure, torch.Tensor):
        yield prefix, structure
    elif isinstance(structure, Mapping):
        for key, value in structure.items():
            yield from walk(value, _join(prefix, str(key)))
    elif isinstance(structure, tuple | list):
        for index, value in enumerate(structure):
            yield from walk(value, _join(prefix, str(index)))


def get(structure: Any, address: str) -> Any:
    """Return what lies at `address`.

    Raises:
        LookupError: nothing lies there.
    """
    for step in _steps(address):
        structure = structure[step] if isinstance(structure, Mapping) else structure[int(step)]
    return structure


def replace(structure: Any, address: str, value: Any) -> Any:
    """Return `structure` with `value` at `address`; containers on the way are copied."""
    steps = _steps(address)
    return _replace(structure, steps, value)


def _replace(structure: Any, steps: list[str], value: Any) -> Any:
    if not steps:
        return value
    first, rest = steps[0], steps[1:]
    if isinstance(structure, Mapping):
        changed: Any = copy(structure)
        changed[first] = _replace(structure[first], rest, value)
        return changed
    items = list(structure)
    items[int(first)] = _replace(items[int(first)], rest, value)
    if hasattr(structure, "_fields"):
        return structure.__class__(*items)
    return structure.__class__(items)


def inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a module's arguments as the one structure that input addresses refer to."""
    return {"args": args, "kwargs": kwargs}


def _join(prefix: str, step: str) -> str:
    return f"{prefix}.{step}" if prefix else step


def _steps(address: str) -> list[str]:
    return address.split(".") if address else []
