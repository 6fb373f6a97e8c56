"""A graph in the order of the forward: what runs when, what dies when, what can never run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ndif_actor.engine import adapter
from ndif_actor.engine.blueprint import Blueprint
from ndif_actor.engine.depth import NEVER
from ndif_actor.engine.hookpoints import HookTable, Site
from ndif_actor.engine.moments import Moment
from ndif_actor.engine.program import BEFORE_FORWARD, Program, Reach, compile_graph
from ndif_actor.errors import RequestError
from ndif_client.wire.graph import (
    PREFILL,
    Apply,
    CallModule,
    Constant,
    Graph,
    HookPoint,
    Node,
    Parameter,
    ReadHook,
    Ref,
    Save,
    Slice,
    Source,
    Steps,
    WriteHook,
    references,
)
from ndif_client.wire.messages import Fault
from ndif_client.wire.tensors import TensorSpec
from tests.models import CONFIGS
from tests.requests import Recorder

#: Layers "0" to "4" fire in order; the output of layer n at moment n.
LAYERS = 5


def site(path: str, order: int, dtype: torch.dtype = torch.float32) -> Site:
    return Site(
        point=HookPoint(path, "output"),
        order=order,
        shape=("batch", "sequence", 4),
        dtype=dtype,
        batch_axis=0,
        token_axis=1,
        packed_shape=(1, "T", 4),
    )


def table() -> HookTable:
    sites = [site(str(n), n) for n in range(LAYERS)] + [site("ids", LAYERS, torch.int64)]
    return HookTable(
        sites={s.point: s for s in sites},
        moments={Moment(s.point.path, "output", 0): s.order for s in sites},
        attention=frozenset(["block.attention"]),
        layers=None,
        unpackable=None,
    )


def at(layer: int | str) -> HookPoint:
    return HookPoint(str(layer), "output")


def compiled(nodes: list[Node], num_invokes: int = 1) -> Program:
    lines = range(len(nodes))
    graph = Graph(nodes, [Source("user.py", n + 1) for n in lines], list(lines))
    return compile_graph(graph, table(), num_invokes)


def refused(nodes: list[Node]) -> Fault:
    with pytest.raises(RequestError) as caught:
        compiled(nodes)
    fault = caught.value.fault
    assert fault.kind == "graph"
    assert fault.node is not None and fault.source == Source("user.py", fault.node + 1)
    return fault


# ---------------------------------------------------------------- order


def test_a_node_runs_at_the_latest_hook_point_it_depends_on() -> None:
    program = compiled(
        [
            ReadHook(at(3)),  # 0
            ReadHook(at(1)),  # 1
            Apply("neg", [Ref(1)]),  # 2
            Apply("add", [Ref(0), Ref(2)]),  # 3
            Save(Ref(3)),  # 4
            Save(Ref(2)),  # 5
        ]
    )

    assert program.at(0).nodes == {1: [1, 2, 5], 3: [0, 3, 4]}
    assert program.at(0).last == 3


def test_at_one_hook_point_nodes_run_in_the_order_they_were_written() -> None:
    program = compiled(
        [ReadHook(at(2)), WriteHook(at(2), 0.0), ReadHook(at(2)), WriteHook(at(2), Ref(0))]
    )

    assert program.at(0).nodes == {2: [0, 1, 2, 3]}


def test_what_needs_nothing_from_the_forward_runs_where_it_is_first_used() -> None:
    constant = Constant(TensorSpec("float32", (4,), 0))
    program = compiled(
        [
            constant,  # 0: used at layer 2 only
            Parameter("weight"),  # 1: saved, so before the forward
            Apply("neg", [Ref(0)]),  # 2
            Apply("neg", [Ref(1)]),  # 3
            Save(Ref(3)),  # 4
            ReadHook(at(4)),  # 5
            ReadHook(at(2)),  # 6
            Apply("add", [Ref(5), Ref(2)]),  # 7
            Apply("add", [Ref(6), Ref(2)]),  # 8
        ]
    )

    assert program.at(0).nodes == {BEFORE_FORWARD: [1, 3, 4], 2: [0, 2, 6, 8], 4: [5, 7]}


def test_a_program_is_woken_only_where_it_reads_or_writes() -> None:
    program = compiled([ReadHook(at(1)), Apply("neg", [Ref(0)]), WriteHook(at(3), Ref(1))])

    assert program.at(0).moments() == {Moment("1", "output", 0), Moment("3", "output", 0)}


def test_a_program_without_hook_points_needs_no_forward() -> None:
    assert compiled([Parameter("weight"), Save(Ref(0))]).at(0).last == BEFORE_FORWARD
    assert compiled([]).at(0).last == BEFORE_FORWARD


# ---------------------------------------------------------------- lifetimes


def test_a_value_dies_at_its_last_use_in_the_order_of_the_forward() -> None:
    program = compiled(
        [
            ReadHook(at(0)),  # 0
            ReadHook(at(3)),  # 1
            Apply("add", [Ref(0), Ref(1)]),  # 2: runs last, though written first
            ReadHook(at(1)),  # 3
            Apply("add", [Ref(0), Ref(3)]),  # 4
        ]
    )

    assert program.at(0).dies == {2: [0, 1], 4: [3]}
    assert program.at(0).outlives == {0}


@st.composite
def graphs(draw: st.DrawFn) -> list[Node]:
    """Graphs whose references are in order; their writes may still come too late."""
    nodes: list[Node] = []
    values: list[int] = []
    for number in range(draw(st.integers(1, 12))):
        kinds = ["read", "constant"] + ["apply", "write", "save"] * bool(values)
        kind = draw(st.sampled_from(kinds))
        layer = at(draw(st.integers(0, LAYERS - 1)))
        used = [Ref(draw(st.sampled_from(values))) for _ in range(2)] if values else []
        match kind:
            case "read":
                nodes.append(ReadHook(layer))
            case "constant":
                nodes.append(Parameter("weight"))
            case "apply":
                nodes.append(Apply("add", list(used)))
            case "write":
                nodes.append(WriteHook(layer, used[0]))
            case "save":
                nodes.append(Save(used[0]))
        if kind in ("read", "constant", "apply"):
            values.append(number)
    return nodes


@given(nodes=graphs())
@settings(max_examples=200, deadline=None)
def test_every_value_is_there_when_it_is_used_and_gone_after_its_last_use(
    nodes: list[Node],
) -> None:
    try:
        program = compiled(nodes)
    except RequestError as error:
        assert "reaches only afterwards" in error.fault.message
        assert error.fault.other_source is not None
        return

    ran = [number for order in sorted(program.at(0).nodes) for number in program.at(0).nodes[order]]
    assert sorted(ran) == list(range(len(nodes)))
    alive: set[int] = set()
    for number in ran:
        used = set(references(nodes[number]))
        assert used <= alive
        alive -= set(program.at(0).dies.get(number, ()))
        alive.add(number)
    unused = set(range(len(nodes))) - {used for node in nodes for used in references(node)}
    assert alive == unused


@given(nodes=graphs())
@settings(max_examples=200, deadline=None)
def test_reads_and_writes_happen_at_their_own_moment_and_nothing_before_it_can(
    nodes: list[Node],
) -> None:
    try:
        program = compiled(nodes)
    except RequestError:
        return

    order = {number: o for o, numbers in program.at(0).nodes.items() for number in numbers}
    for number, node in enumerate(nodes):
        if isinstance(node, ReadHook | WriteHook):
            assert order[number] == int(node.hook.path)
        for used in references(node):
            assert order[used] <= order[number]
            if order[used] < order[number]:
                assert used in program.at(0).outlives
    for numbers in program.at(0).nodes.values():
        assert numbers == sorted(numbers)


# ---------------------------------------------------------------- refused


def test_a_write_that_needs_a_later_hook_point_names_both_lines() -> None:
    fault = refused([ReadHook(at(3)), Apply("neg", [Ref(0)]), WriteHook(at(1), Ref(1))])

    assert fault.message == (
        "1.output is written with a value that needs 3.output, which the model reaches only "
        "afterwards"
    )
    assert (fault.node, fault.hook) == (2, "1.output")
    assert fault.other_source == Source("user.py", 1)


def test_the_read_that_makes_a_value_late_is_named_among_several() -> None:
    nodes: list[Node] = [ReadHook(at(0)), ReadHook(at(4)), ReadHook(at(2))]
    nodes += [Apply("cat", [Ref(2), Ref(1), Ref(0)]), WriteHook(at(3), Ref(3))]

    assert refused(nodes).other_source == Source("user.py", 2)


def test_a_reference_to_a_later_node_is_refused() -> None:
    assert (
        "node 0 refers to node 1, a later one"
        in refused([Apply("neg", [Ref(1)]), ReadHook(at(0))]).message
    )
    assert "node 0 refers to node 0" in refused([Apply("neg", [Ref(0)])]).message


def test_a_reference_to_a_write_or_save_is_refused() -> None:
    nodes: list[Node] = [ReadHook(at(0)), Save(Ref(0)), Apply("neg", [Ref(1)])]

    assert "node 1 is not a value" in refused(nodes).message


def test_an_invoke_that_does_not_exist_is_refused() -> None:
    assert "invoke 1 does not exist; there are 1" in refused([ReadHook(at(0), invoke=1)]).message


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (HookPoint("11", "output"), "no module '11' is called in a forward; did you mean '1'?"),
        (HookPoint("3", "output", "", 2), "the module is called 1 time(s) in a forward"),
        (HookPoint("3", "output", "0"), "no such tensor; its output offers the leaves ''"),
        (HookPoint("3", "input", "args.0"), "no such tensor; its input offers the leaves none"),
    ],
)
def test_an_unknown_hook_point_is_refused_with_what_there_is(hook: HookPoint, message: str) -> None:
    fault = refused([ReadHook(hook)])

    assert message in fault.message
    assert fault.hook == str(hook)


def test_a_write_to_integers_is_refused_with_what_to_do_instead() -> None:
    message = refused([WriteHook(at("ids"), 1)]).message

    assert "holds integers and is read-only" in message
    assert "write the output of its embedding" in message


@pytest.mark.parametrize("path", ["block.attention", "block", ""])
def test_a_module_that_attends_can_not_be_called(path: str) -> None:
    message = refused([ReadHook(at(0)), CallModule(path, [Ref(0)])]).message

    assert f"{path or 'the model'!r} attends, so it can't be called on a value" in message


def test_what_lies_inside_of_a_module_that_attends_can_be_called() -> None:
    compiled([ReadHook(at(0)), CallModule("block.attention.q_proj", [Ref(0)])])


def test_a_graph_without_recorded_lines_is_refused_just_as_well() -> None:
    with pytest.raises(RequestError) as caught:
        compile_graph(Graph([Save(Ref(3))]), table(), 1)

    assert caught.value.fault.source is None


# ---------------------------------------------------------------- steps of a generation


def stepped(nodes: list[tuple[Node, Steps]], num_steps: int = 8) -> Program:
    blocks = list(dict.fromkeys(steps for _, steps in nodes))
    lines = list(range(len(nodes)))
    sources = [Source("user.py", n + 1) for n in lines]
    during = [blocks.index(steps) for _, steps in nodes]
    graph = Graph([node for node, _ in nodes], sources, lines, blocks, during)
    return compile_graph(graph, table(), 1, num_steps)


ALL, LATER = Steps(), Steps(1)


def test_each_step_runs_the_nodes_of_its_blocks() -> None:
    program = stepped(
        [
            (ReadHook(at(1)), PREFILL),
            (Save(Ref(0)), PREFILL),
            (ReadHook(at(2)), ALL),
            (Save(Ref(2)), ALL),
            (ReadHook(at(0)), Steps(2, 7, 3)),
        ]
    )

    assert program.at(0).nodes == {1: [0, 1], 2: [2, 3]}
    assert program.at(1).nodes == program.at(6).nodes == {2: [2, 3]}
    assert program.at(2).nodes == program.at(5).nodes == {0: [4], 2: [2, 3]}


def test_a_value_of_an_earlier_step_is_there_before_the_forward() -> None:
    program = stepped(
        [
            (ReadHook(at(4)), PREFILL),
            (Apply("neg", [Ref(0)]), LATER),
            (WriteHook(at(1), Ref(1)), Steps(3, 5)),
        ]
    )

    assert program.at(1).nodes == {BEFORE_FORWARD: [1]}
    assert program.kept == {0: None}


def test_a_value_is_kept_until_the_last_step_that_uses_it() -> None:
    program = stepped(
        [
            (ReadHook(at(4)), PREFILL),
            (WriteHook(at(1), Ref(0)), Steps(3, 6)),
            (WriteHook(at(2), Ref(0)), Steps(1, 5, 2)),
        ]
    )

    assert program.kept == {0: 5}


def test_a_value_that_is_too_late_in_its_own_step_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        stepped([(ReadHook(at(4)), PREFILL), (WriteHook(at(1), Ref(0)), ALL)])

    assert "reaches only afterwards" in caught.value.fault.message


@pytest.mark.parametrize(
    ("made", "used"),
    [(ALL, Steps(9, 10)), (LATER, ALL), (Steps(0, 5), LATER), (Steps(3, 4), LATER)],
)
def test_a_value_of_no_one_step_is_refused_with_both_lines(made: Steps, used: Steps) -> None:
    nodes: list[tuple[Node, Steps]] = [(ReadHook(at(1)), made), (Apply("neg", [Ref(0)]), used)]
    if made.includes(used):
        stepped(nodes, 20)
        return
    with pytest.raises(RequestError) as caught:
        stepped(nodes, 20)

    fault = caught.value.fault
    assert "no one value" in fault.message
    assert fault.source == Source("user.py", 2) and fault.other_source == Source("user.py", 1)


def test_a_step_that_is_never_made_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        stepped([(ReadHook(at(1)), Steps(8))], num_steps=8)

    assert caught.value.fault.message == "steps 8: will never be made, steps 0 to 7 are"


@pytest.mark.parametrize("during", [[0], [0, 1], [0, 0, 0]])
def test_a_graph_that_does_not_say_when_each_node_runs_is_refused(during: list[int]) -> None:
    graph = Graph([ReadHook(at(1)), Save(Ref(0))], steps=[PREFILL], during=during)

    with pytest.raises(RequestError):
        compile_graph(graph, table(), 1)


def test_blocks_that_overlap_too_often_are_refused_before_they_cost_time() -> None:
    many = [(ReadHook(at(1)), Steps(start, 1000)) for start in range(500) for _ in range(30)]

    with pytest.raises(RequestError) as caught:
        stepped(many, num_steps=1000)

    assert caught.value.fault.kind == "limit"


def test_steps_that_are_none_are_refused() -> None:
    with pytest.raises(RequestError) as caught:
        stepped([(ReadHook(at(1)), Steps(3, 3))])

    assert "none at all" in caught.value.fault.message


# ---------------------------------------------------------------- depth


def test_what_a_step_needs_of_its_rows_is_known_by_invoke() -> None:
    model = Blueprint(adapter.build_without_weights(CONFIGS["llama"](), torch.float32), 1)
    recorder = Recorder()
    recorder.read("model.layers.1.mlp.output", 0)
    logits = recorder.read("lm_head.output", 1)
    recorder.save(recorder.apply("getitem", logits, (slice(None), -1)))
    recorder.save(recorder.apply("getitem", logits, (..., slice(0, 2), slice(None))))
    recorder.write("model.layers.2.output", 0.0, 1)
    recorder.save(recorder.read("output[logits]", 2))
    recorder.write("model.embed_tokens.output", 0.0, 3)

    reach = model.compile(recorder.graph(), 5).at(0).reach

    assert reach[0] == Reach(2, NEVER, ())
    assert (reach[1].last, reach[1].first_write) == (6, 5)
    assert reach[1].tail is not None and set(reach[1].tail) == {-1, Slice(0, 2)}
    assert reach[2] == Reach(6, NEVER, None)
    assert reach[3] == Reach(-1, -1, ())
    assert reach[4] == Reach(-1, NEVER, ())
