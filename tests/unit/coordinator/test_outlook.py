"""What a request may count on, and in which words it is refused where it may not."""

from __future__ import annotations

import pytest

from ndif_actor.coordinator.held import Known
from ndif_actor.coordinator.outlook import Cause, Outlook, check_keeps
from ndif_actor.errors import RequestError
from ndif_client.wire.graph import Constant, Graph, Held, Invoke, Keep, Node, Ref, Save, Source
from ndif_client.wire.messages import Decoding, Fault, HeldSpec, TraceRequest
from ndif_client.wire.tensors import TensorSpec

VECTOR: HeldSpec = TensorSpec("float32", (3,))
MATRIX: HeldSpec = TensorSpec("float32", (3, 3))
LINE = Source("experiment.py", 7, "h + w")


def request(name: str, *nodes: Node, after: tuple[str, ...] = ()) -> TraceRequest:
    return TraceRequest(
        id=f"{name}-request",
        model="m",
        invokes=[],
        graph=Graph(list(nodes), [LINE], [0] * len(nodes)),
        session="session-1",
        after=[f"{each}-request" for each in after],
    )


def test_a_request_uses_what_its_session_holds() -> None:
    outlook = Outlook({"session-1": Known({"w": VECTOR}), "session-2": Known({"v": VECTOR})})

    assert outlook.held_by(request("a", Held("w"), Save(Ref(0)))) == {"w": VECTOR}
    with pytest.raises(RequestError, match=r"nothing is held as 'v'.* held are: 'w'") as refused:
        outlook.held_by(request("b", Held("v")))
    assert (refused.value.fault.kind, refused.value.fault.source) == ("graph", LINE)


def test_what_was_lost_is_told_from_what_never_was() -> None:
    outlook = Outlook({"session-1": Known({}, frozenset({"w"}))})

    with pytest.raises(RequestError, match="'w' was lost when the model restarted") as refused:
        outlook.held_by(request("a", Held("w")))
    assert (refused.value.fault.kind, refused.value.fault.source) == ("unavailable", LINE)


def test_members_of_a_chain_count_on_what_those_before_them_keep() -> None:
    outlook = Outlook({"session-1": Known({"w": VECTOR})})
    outlook.note_admitted("a-request", {"w": MATRIX})
    second = request("b", Held("w"), after=("a",))
    outlook.note_admitted("b-request", {**outlook.kept_before(second), "v": VECTOR})

    third = request("c", Held("w"), Held("v"), after=("b",))

    assert outlook.held_by(second) == {"w": MATRIX}
    assert outlook.held_by(third) == {"w": MATRIX, "v": VECTOR}
    assert outlook.held_by(request("other", Held("w"))) == {"w": VECTOR}
    with pytest.raises(RequestError, match="nothing is held as 'v'"):
        outlook.held_by(request("other", Held("v"), after=("a",)))


def test_what_comes_after_a_refused_request_is_refused_with_the_first_reason() -> None:
    outlook = Outlook(failed={"z-request": Cause("z-request", Fault(kind="limit", message="far"))})
    outlook.note_refused(request("a"), Fault(kind="graph", message="bad", source=LINE))
    second = request("b", after=("a",))
    with pytest.raises(RequestError) as refused:
        outlook.check_after(second)
    outlook.note_refused(second, refused.value.fault)
    with pytest.raises(RequestError) as again:
        outlook.check_after(request("c", after=("b",)))

    assert again.value.fault == refused.value.fault
    assert "after request a-request, which has failed, so it has not run: bad" in str(again.value)
    assert (again.value.fault.kind, again.value.fault.source) == ("graph", LINE)
    with pytest.raises(RequestError, match="far"):
        outlook.check_after(request("d", after=("z",)))


CONSTANT = Constant(TensorSpec("float32", (3,), 0))


def test_a_name_is_kept_once_by_a_trace_of_a_session() -> None:
    good = request("a", CONSTANT, Keep(Ref(0), "w"), Keep(Ref(0), "v"))
    check_keeps(good)

    with pytest.raises(RequestError, match="'w' is kept twice"):
        check_keeps(request("a", CONSTANT, Keep(Ref(0), "w"), Keep(Ref(0), "w")))
    for nodes in ((CONSTANT, Keep(Ref(0), "w")), (Held("w"),)):
        alone = TraceRequest(id="abcdefgh", model="m", invokes=[], graph=Graph(list(nodes)))
        with pytest.raises(RequestError, match="belong to a session"):
            check_keeps(alone)


def test_a_generation_may_keep_values_and_use_what_is_held() -> None:
    def generation(*nodes: Node) -> TraceRequest:
        return TraceRequest(
            id="abcdefgh",
            model="m",
            invokes=[Invoke(["x"])],
            graph=Graph(list(nodes)),
            decoding=Decoding(max_new_tokens=2),
            session="session-1",
        )

    check_keeps(generation(Held("w")))
    check_keeps(generation(CONSTANT, Keep(Ref(0), "w")))
