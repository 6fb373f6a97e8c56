"""Addresses of tensors inside what modules take and return."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from ndif_actor.engine import leaves

A, B, C = (torch.tensor([float(n)]) for n in range(3))

Pair = namedtuple("Pair", ["left", "right"])

STRUCTURES: list[tuple[Any, dict[str, torch.Tensor]]] = [
    (A, {"": A}),
    ((A, None, B), {"0": A, "2": B}),
    ([A, (B, [C])], {"0": A, "1.0": B, "1.1.0": C}),
    (OrderedDict(x=A, y=(B, 3)), {"x": A, "y.0": B}),
    (Pair(A, B), {"0": A, "1": B}),
    (CausalLMOutputWithPast(logits=A, hidden_states=(B,)), {"logits": A, "hidden_states.0": B}),
    (leaves.inputs((A, 2), {"mask": None, "pair": (B, C)}),
     {"args.0": A, "kwargs.pair.0": B, "kwargs.pair.1": C}),
    (None, {}),
    ("text", {}),
]  # fmt: skip

every_structure = pytest.mark.parametrize(("structure", "addresses"), STRUCTURES)


@every_structure
def test_every_tensor_is_found_with_its_address(
    structure: Any, addresses: dict[str, torch.Tensor]
) -> None:
    assert dict(leaves.walk(structure)) == addresses


@every_structure
def test_what_lies_at_an_address_is_what_was_found_there(
    structure: Any, addresses: dict[str, torch.Tensor]
) -> None:
    for address, tensor in addresses.items():
        assert leaves.get(structure, address) is tensor


@every_structure
def test_a_replacement_changes_one_tensor_of_a_copy(
    structure: Any, addresses: dict[str, torch.Tensor]
) -> None:
    new = torch.tensor([9.0])
    for address in addresses:
        changed = leaves.replace(structure, address, new)

        assert type(changed) is type(structure)
        assert dict(leaves.walk(changed)) == addresses | {address: new}
        assert dict(leaves.walk(structure)) == addresses


def test_a_replaced_output_of_transformers_keeps_its_attributes_and_its_order() -> None:
    output = CausalLMOutputWithPast(loss=B, logits=A)

    changed = leaves.replace(output, "logits", C)

    assert changed.logits is C and changed["logits"] is C
    assert changed.loss is B
    assert changed.to_tuple() == (B, C)
    assert output.logits is A


@pytest.mark.parametrize("address", ["1", "logits", "0.0.x", "0"])
def test_an_address_where_nothing_lies_is_a_lookup_error(address: str) -> None:
    with pytest.raises(LookupError):
        leaves.get({"args": ()}, address)
