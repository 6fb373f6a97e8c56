"""Exceptions: one for each kind of fault, with the user's lines, and safe to send elsewhere."""

from __future__ import annotations

import inspect
import pickle
from typing import get_args, get_type_hints

import pytest

from ndif_client import errors
from ndif_client.errors import NdifError, from_fault
from ndif_client.wire.graph import Source
from ndif_client.wire.messages import Fault

HERE = Source("/home/me/experiment.py", 12, "h = model.layers[3].output")
THERE = Source("/home/me/experiment.py", 14, "model.layers[1].output = h")

ALL = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, NdifError)
]


def test_every_kind_of_fault_has_its_exception() -> None:
    kinds = get_args(get_type_hints(Fault)["kind"])

    raised = {type(from_fault(Fault(kind=kind, message="m"))) for kind in kinds}

    assert len(raised) == len(kinds)
    assert NdifError not in raised


def test_a_message_ends_with_the_users_line() -> None:
    error = from_fault(Fault(kind="execution", message="it failed", source=HERE))

    assert str(error) == ("it failed\n  at /home/me/experiment.py:12: h = model.layers[3].output")


def test_two_lines_that_conflict_are_both_named() -> None:
    error = from_fault(Fault(kind="graph", message="too late", source=THERE, other_source=HERE))

    assert isinstance(error, errors.OrderError)
    assert str(error).splitlines() == ["too late", f"  at {THERE}", f"  and {HERE}"]


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    documented = {
        word
        for line in (errors.__doc__ or "").splitlines()
        for word in line.split()
        if word.endswith("Error")
    }

    assert documented - {"AttributeError"} == {kind.__name__ for kind in ALL}
    assert all(kind.__doc__ for kind in ALL)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_an_exception_survives_pickling(kind: type[NdifError]) -> None:
    fault = Fault(kind="graph", message="m", source=HERE)

    copy = pickle.loads(pickle.dumps(kind("what happened", fault)))

    assert type(copy) is kind
    assert str(copy) == "what happened"
    assert copy.fault == fault


def test_only_busy_says_when_to_come_back() -> None:
    error = from_fault(Fault(kind="busy", message="full", retry_after=2.5))

    assert isinstance(error, errors.BusyError)
    assert error.retry_after == 2.5
    assert errors.BusyError("full").retry_after is None
