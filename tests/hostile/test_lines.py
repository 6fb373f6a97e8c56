"""Lines that a request logs: its own, in order, and not without end."""

from __future__ import annotations

from ndif_actor.engine.execution import MAX_LINES
from ndif_actor.messages import LogLine
from tests.conftest import LoadEngine, LoadOracle
from tests.integration.engine.experiments import EXPERIMENTS
from tests.requests import EXACT, LLAMA, Recorder, Request, assert_equal, run, saved

PROMPT = [5, 6, 7, 8]


def test_a_flood_of_lines_ends_and_its_neighbour_notices_nothing(
    load_engine: LoadEngine, load_oracle: LoadOracle
) -> None:
    flood = Recorder()
    hidden = flood.read("model.layers.1.output")
    for number in range(MAX_LINES + 50):
        flood.log(f"line {number}", "x" * 4090)
    flood.log(hidden)
    neighbour = EXPERIMENTS[0](LLAMA)
    lines: list[LogLine] = []

    requests = [Request(flood, [[PROMPT]]), neighbour]
    results, buffers = run(load_engine("llama"), requests, tell=lines.append)

    assert results[0].fault is None
    assert len(lines) == MAX_LINES
    assert {line.request for line in lines} == {"request-0"}
    assert lines[7].text.startswith("line 7 xxx")
    assert max(len(line.text) for line in lines[:-1]) <= 4096
    assert lines[-1].text.endswith("this was the last)")
    assert_equal(saved(results[1], buffers), neighbour.on(load_oracle("llama")), EXACT)


def test_who_has_failed_logs_nothing_more(load_engine: LoadEngine) -> None:
    recorder = Recorder()
    hidden = recorder.read("model.layers.1.output")
    recorder.log("shape is fine", recorder.apply("norm", hidden))
    far = recorder.apply("add", recorder.apply("argmax", hidden, -1), 10_000)
    recorder.log("never", recorder.apply("getitem", hidden, (slice(None), far)))
    recorder.log("after")
    lines: list[LogLine] = []

    results, _ = run(load_engine("llama"), [Request(recorder, [[PROMPT]])], tell=lines.append)

    assert results[0].fault is not None
    assert [line.text.split()[0] for line in lines] == ["after", "shape"]


def test_a_line_shows_a_value_as_it_was_when_it_was_written(load_engine: LoadEngine) -> None:
    recorder = Recorder()
    hidden = recorder.read("model.layers.1.output")
    recorder.log(recorder.apply("mul", recorder.apply("zeros_like", hidden), 0))
    recorder.write("model.layers.1.output", recorder.apply("full_like", hidden, 7.0))
    recorder.log(recorder.apply("sum", recorder.read("model.layers.1.output")))
    lines: list[LogLine] = []

    run(load_engine("llama"), [Request(recorder, [[PROMPT]])], tell=lines.append)

    assert lines[0].text.startswith("tensor([[[0., 0.")
    assert lines[1].text == str(7 * 4 * 48)
