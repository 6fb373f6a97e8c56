"""Every node knows the user's file, line and text, wherever it was written."""

from __future__ import annotations

import linecache
from typing import Any

import torch

from ndif_client import Session
from ndif_client.sources import capture
from ndif_client.wire.graph import Source
from tests.unit.client.trees import finished_graph, scratch


def _sources(trace: Any) -> list[Source]:
    graph = finished_graph(trace)
    return [source for n in range(len(graph.nodes)) if (source := graph.source_of(n)) is not None]


def test_a_line_is_the_users_also_behind_torch(session: Session, model: Any) -> None:
    with scratch(session) as trace:
        h = model.model.layers[0].output  # the read
        y = torch.nn.functional.softmax(h, dim=-1)  # the softmax
        torch.nn.Linear(6, 2)(y)  # the probe

    lines = [source.text for source in _sources(trace)]
    assert all(source.file == __file__ for source in _sources(trace))
    assert lines[0] == "h = model.model.layers[0].output  # the read"
    assert lines[1].endswith("# the softmax")
    assert all(line.endswith("# the probe") for line in lines[2:])


def test_lines_inside_of_a_function_given_to_trace_are_found(session: Session) -> None:
    def experiment(model: Any) -> Any:
        return model.model.norm.output * 2  # in the function

    trace = session.trace("x", experiment)

    assert _sources(trace)[0].text.endswith("# in the function")


def test_lines_of_a_notebook_cell_are_found(session: Session, model: Any) -> None:
    cell = "def run(model):\n    model.lm_head.output.save()\n"
    name = "<ipython-input-3-abc>"
    linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(cell, name, "exec"), names)

    with scratch(session) as trace:
        names["run"](model)

    assert _sources(trace)[0] == Source(name, 2, "model.lm_head.output.save()")


def test_a_line_is_sent_once_however_many_nodes_it_makes(session: Session, model: Any) -> None:
    with scratch(session) as trace:
        for layer in model.model.layers:
            layer.output.save()
    graph = finished_graph(trace)

    assert len(graph.nodes) == 6
    assert len(graph.sources) == 1


def test_a_file_name_that_is_no_text_can_still_be_sent() -> None:
    names: dict[str, Any] = {"__name__": "__main__", "capture": capture}
    exec(compile("source = capture()", "/tmp/\udcff.py", "exec"), names)

    assert names["source"].file == "/tmp/?.py"


def test_a_very_long_line_is_cut() -> None:
    name = "<long>"
    linecache.cache[name] = (1, None, ["x" * 10_000], name)
    names: dict[str, Any] = {"__name__": "__main__", "capture": capture}
    exec(compile("source = capture()", name, "exec"), names)

    assert len(names["source"].text) == 200
