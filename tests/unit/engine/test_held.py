"""What a shard holds: ordinary tensors, copied when kept, there when it is settled."""

from __future__ import annotations

import pytest
import torch

from ndif_actor.engine.held import HeldStore, Holdings, from_spec, spec_of
from ndif_actor.messages import Dropped
from ndif_client.wire.tensors import TensorSpec


def keep(store: HeldStore, request: str, scope: str, **values: torch.Tensor) -> None:
    holdings = Holdings(store, scope, {})
    for name, value in values.items():
        holdings.keep(name, value)
    store.put_aside(request, holdings)


def get(store: HeldStore, scope: str, name: str, value: torch.Tensor) -> torch.Tensor:
    found = Holdings(store, scope, {name: spec_of(value)}).get(name)
    assert isinstance(found, torch.Tensor)
    return found


def test_a_value_is_held_when_it_is_settled_and_not_before() -> None:
    store, value = HeldStore(), torch.arange(3.0)
    keep(store, "a", "1", w=value)
    assert store.find("1", "w") is None

    store.settle(["a"], [])

    assert torch.equal(get(store, "1", "w", value), value)
    assert store.find("2", "w") is None


def test_what_is_not_settled_is_gone_when_the_next_pass_begins() -> None:
    store = HeldStore()
    keep(store, "a", "1", w=torch.zeros(1))
    keep(store, "b", "1", w=torch.ones(1))
    store.settle(["b"], [])
    store.forget_waiting()

    assert torch.equal(get(store, "1", "w", torch.ones(1)), torch.ones(1))
    assert store._waiting == {}


def test_the_last_one_settled_replaces_the_others() -> None:
    store = HeldStore()
    for request, value in (("a", 1.0), ("b", 2.0)):
        keep(store, request, "1", w=torch.tensor(value))

    store.settle(["a", "b"], [])

    assert get(store, "1", "w", torch.tensor(0.0)) == 2.0


def test_dropping_takes_names_or_whole_scopes() -> None:
    store = HeldStore()
    keep(store, "a", "1", w=torch.zeros(1), v=torch.zeros(1))
    keep(store, "b", "2", w=torch.zeros(1))

    store.settle(["a", "b"], [Dropped("1", ["w", "nothing"]), Dropped("2")])

    assert list(store._held) == ["1"]
    assert list(store._held["1"]) == ["v"]


@torch.inference_mode()
def _made_in_inference_mode() -> torch.Tensor:
    return torch.ones(4, 4) * 2


def test_a_kept_value_is_a_copy_that_autograd_can_use() -> None:
    store, value = HeldStore(), _made_in_inference_mode()
    view = value[:, :1].expand(4, 4)
    with torch.inference_mode():
        keep(store, "a", "1", w=value, wide=view)
        store.settle(["a"], [])
        value.zero_()

    kept = get(store, "1", "w", value)
    leaf = torch.ones(4, 4, requires_grad=True)
    (leaf * kept).sum().backward()

    assert leaf.grad is not None and torch.equal(leaf.grad, torch.full((4, 4), 2.0))
    assert not kept.requires_grad and not kept.is_inference()
    wide = get(store, "1", "wide", value)
    assert wide.is_contiguous() and wide.untyped_storage().nbytes() == 64


def test_a_value_that_went_or_changed_since_it_was_checked_is_refused_in_words() -> None:
    store = HeldStore()
    keep(store, "a", "1", w=torch.zeros(2))
    store.settle(["a"], [])

    with pytest.raises(ValueError, match=r"float32\[2\] by now, and was float32\[3\]"):
        get(store, "1", "w", torch.zeros(3))
    with pytest.raises(LookupError, match="'v' is not held any more"):
        get(store, "1", "v", torch.zeros(3))


def test_tuples_are_held_as_such() -> None:
    store, pair = HeldStore(), (torch.zeros(2), torch.ones(1).long())
    holdings = Holdings(store, "1", {"pair": spec_of(pair)})
    holdings.keep("pair", pair)
    store.put_aside("a", holdings)
    store.settle(["a"], [])

    found = holdings.get("pair")

    assert isinstance(found, tuple) and [item.dtype for item in found] == [
        torch.float32,
        torch.int64,
    ]
    assert spec_of(from_spec(spec_of(pair))) == [
        TensorSpec("float32", (2,)),
        TensorSpec("int64", (1,)),
    ]
