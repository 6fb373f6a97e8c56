"""What is proven of a tensor-parallel replica; each case runs on all ranks together.

Comparisons are made on rank 0 alone: the others report no values.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ndif_actor.engine.engine import Engine
from ndif_actor.engine.layout import Sharded, ShardGroup
from ndif_actor.messages import Settle
from ndif_client.wire.graph import Held, Keep
from ndif_client.wire.tensors import TensorSpec
from tests.generations import Driver
from tests.integration.engine.experiments import EIFFEL, EXPERIMENTS, SHORT, plain, touching_steps
from tests.oracle import Oracle
from tests.requests import (
    EXACT,
    LLAMA,
    Recorder,
    Request,
    assert_equal,
    assert_same_gradients,
    differentiated,
    flipped,
    read_all,
    run,
    saved,
    touchable,
)

SMOLLM2_PROMPTS = [
    [504, 1195, 4112, 22159, 314, 281, 260, 2240, 282],
    [504, 3575, 282, 4649, 314],
    [19556, 665, 17],
]


class Shard:
    """This rank: its engines and, on rank 0, its oracles, each loaded once."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.folder = folder
        self.rank = rank
        self.world_size = world_size
        self.engine = cache(self._engine)
        self.oracle = cache(self._oracle)

    def _engine(self, family: str, dtype: str = "float64") -> Engine:
        return Engine.load(
            self.folder / f"{family}-{dtype}",
            dtype=dtype,
            device="cpu",
            rank=self.rank,
            world_size=self.world_size,
            cache_bytes=1 << 24,
        )

    def _oracle(self, family: str, dtype: str = "float64") -> Oracle:
        return Oracle(self.folder / f"{family}-{dtype}", getattr(torch, dtype))

    def check(
        self,
        family: str,
        requests: Sequence[Request],
        dtype: str = "float64",
        tolerance: float = EXACT,
    ) -> None:
        """Run the requests in one forward; rank 0 compares each with the oracle."""
        results, buffers = run(self.engine(family, dtype), requests)
        if self.rank != 0:
            assert results == [] and buffers == []
            return
        for request, result in zip(requests, results, strict=True):
            wanted = request.on(self.oracle(family, dtype))
            assert_equal(saved(result, buffers), wanted, tolerance)


def hook_points(shard: Shard, family: str) -> None:
    points = list(shard.engine(family).blueprint.table.sites)
    shard.check(
        family, [read_all(points, [[EIFFEL]]), read_all(points, [[SHORT, EIFFEL], [SHORT]])]
    )


def writes(shard: Shard, family: str) -> None:
    points = touchable(shard.engine(family))
    shard.check(family, [flipped(point, EIFFEL) for point in points])


def experiments(shard: Shard, family: str) -> None:
    shard.check(family, [experiment(LLAMA) for experiment in EXPERIMENTS])


def parameters(shard: Shard, family: str) -> None:
    recorder = Recorder()
    for name, _ in shard.engine(family).blueprint.model.named_parameters():
        recorder.save(recorder.parameter(name))
    shard.check(family, [Request(recorder, [[EIFFEL]])])


def module_calls(shard: Shard, family: str) -> None:
    """Call the modules of a block on whole values, batched or not, by position and by name."""
    recorder = Recorder()
    for point in shard.engine(family).blueprint.table.sites:
        if point.port == "input" and not point.operation and _is_callable(point.path):
            value = recorder.apply("cos", recorder.read(point))
            recorder.save(recorder.call(point.path, value))
            recorder.save(recorder.call(point.path, recorder.apply("getitem", value, (0, 0))))
    hidden = recorder.read("model.layers.1.output")
    name = "hidden_states" if family == "phi3" else "x"
    recorder.save(recorder.call("model.layers.1.mlp", **{name: hidden}))
    recorder.save(recorder.call("lm_head", **{"input": hidden}))
    ids = recorder.apply("argmax", recorder.read("output[logits]"), -1)
    recorder.save(recorder.call("model.embed_tokens", ids))
    shard.check(family, [Request(recorder, [[EIFFEL]])])


def gradients(shard: Shard, family: str) -> None:
    """Gradients at all hook points, alone and beside others, read and written."""
    engine = shard.engine(family)
    partial = engine._model._partial
    # Only what each rank's own heads use, unless all ranks have all heads.
    assert all(re.search("rotary|position_emb", str(point)) for point in partial)
    assert bool(partial) == (family != "phi3")
    points = [point for point in touchable(engine) if point not in partial]
    requests = [differentiated([point], EIFFEL, "output[logits]") for point in points]
    results, buffers = run(engine, requests)
    if shard.rank == 0:
        assert_same_gradients(requests, results, buffers, shard.oracle(family), 1e-7)
    recorder = Recorder()
    inner = recorder.read("model.layers.0.self_attn.o_proj.input[args.0]")
    outer = recorder.read("model.layers.1.self_attn.o_proj.input[args.0]")
    loss = recorder.apply("sum", recorder.apply("cos", recorder.read("output[logits]")))
    backward = recorder.backward(loss)
    recorder.write_gradient(
        backward, outer, recorder.apply("mul", recorder.gradient(backward, outer), 0.5)
    )
    recorder.save(recorder.gradient(backward, inner))
    shard.check(family, [Request(recorder, [[EIFFEL], [SHORT]])], tolerance=1e-7)


def conditions(shard: Shard, family: str) -> None:
    """All ranks take the branch that the values tell, and draw the same random numbers."""
    for threshold in (-1e9, 1e9):
        recorder = Recorder()
        recorder.seed = 7
        inner = recorder.read("model.layers.1.mlp.gate_proj.output")
        large = recorder.apply("gt", recorder.apply("norm", inner), threshold)
        with recorder.when(large):
            noise = recorder.apply("randn_like", inner)
            recorder.write("model.layers.1.mlp.gate_proj.output", noise)
            recorder.save(noise)
        with recorder.when(large, negated=True):
            half = recorder.apply("mul", inner, 0.5)
            recorder.write("model.layers.1.mlp.gate_proj.output", half)
        recorder.save(recorder.choose(large, inner, half))
        recorder.save(recorder.read("output[logits]"))
        neighbour = EXPERIMENTS[0](LLAMA)
        request = Request(recorder, [[EIFFEL]])
        results, buffers = run(shard.engine(family), [request, neighbour])
        if shard.rank != 0:
            continue
        own = saved(results[0], buffers)
        wanted = by_hand(shard.oracle(family), large=threshold < 0)
        numbers = sorted(own)
        assert len(numbers) == (3 if threshold < 0 else 2)
        torch.testing.assert_close(own[numbers[-1]], wanted, rtol=0, atol=EXACT)
        assert_equal(saved(results[1], buffers), neighbour.on(shard.oracle(family)), EXACT)


def by_hand(oracle: Oracle, *, large: bool) -> torch.Tensor:
    """Return the logits of plain transformers with what one of the branches writes."""

    def change(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        drawn = torch.randn(output.shape, dtype=output.dtype, generator=generator)
        return drawn if large else output * 0.5

    projection = oracle.model.get_submodule("model.layers.1.mlp.gate_proj")
    handle = projection.register_forward_hook(change)
    try:
        return oracle.logits(EIFFEL)
    finally:
        handle.remove()


def _is_callable(path: str) -> bool:
    return path.startswith(
        ("model.layers.1.self_attn.", "model.layers.1.mlp", "model.norm", "lm_head")
    )


def failures(shard: Shard, family: str) -> None:
    """A group fails amid sharded reads, calls and parameters; its neighbours don't notice."""
    recorder = Recorder()
    inner = recorder.read("model.layers.0.self_attn.q_proj.output")
    far = recorder.apply("add", recorder.apply("argmax", inner, -1), 1000)
    broken = recorder.apply("index_select", inner, 1, recorder.apply("getitem", far, 0))
    recorder.write("model.layers.1.self_attn.q_proj.output", broken)
    outer = recorder.read("model.layers.1.self_attn.q_proj.output")
    recorder.save(recorder.apply("linear", outer, recorder.parameter("lm_head.weight")))
    recorder.save(recorder.call("model.layers.1.mlp", recorder.read("model.layers.1.output")))
    embedded = recorder.call("model.embed_tokens", far)
    recorder.save(recorder.call("model.layers.2.mlp.gate_proj", embedded))
    neighbour = EXPERIMENTS[0](LLAMA)
    requests = [neighbour, Request(recorder, [[EIFFEL]]), neighbour]

    for _ in range(2):
        results, buffers = run(shard.engine(family), requests)
        faults = [result.fault for result in results if result.fault is not None]
        assert [fault.node for fault in faults] == [4], results
        assert "out of range" in faults[0].message
        if shard.rank == 0:
            wanted = neighbour.on(shard.oracle(family))
            assert_equal(saved(results[0], buffers), wanted, EXACT)
            assert_equal(saved(results[2], buffers), wanted, EXACT)
        else:
            assert len(results) == 1


def held_values(shard: Shard, family: str) -> None:
    """A value kept in one pass is whole on all ranks in the next; one that is gone fails alone."""
    engine, place = shard.engine(family), "model.layers.1.self_attn.q_proj.output"
    keeper = Recorder()
    value = keeper.read(place)
    keeper.add(Keep(value, "queries"))
    keeper.save(value)
    spec = TensorSpec("float64", (1, len(EIFFEL), 48))
    kept, buffers = run(engine, [Request(keeper, [[EIFFEL]])])
    engine.settle(Settle(["request-0"], []))

    user, absent = Recorder(), Recorder()
    for recorder, name in ((user, "queries"), (absent, "absent")):
        held = recorder.add(Held(name))
        recorder.write(place, recorder.apply("mul", held, -2.0))
        recorder.save(recorder.call("model.layers.0.self_attn.q_proj", held))
        recorder.save(recorder.read("output[logits]"))
    requests = [
        Request(recorder, [[EIFFEL]], held={name: spec})
        for recorder, name in ((absent, "absent"), (user, "queries"))
    ]
    results, used = run(engine, requests)

    faults = [result.fault for result in results if result.fault is not None]
    assert ["is not held any more" in fault.message for fault in faults] == [True]
    if shard.rank == 0:
        constant = Recorder()
        (sent,) = saved(kept[0], buffers).values()
        held = constant.constant(sent)
        constant.write(place, constant.apply("mul", held, -2.0))
        constant.save(constant.call("model.layers.0.self_attn.q_proj", held))
        constant.save(constant.read("output[logits]"))
        wanted = Request(constant, [[EIFFEL]]).on(shard.oracle(family))
        assert_equal(saved(results[1], used), wanted, EXACT)


def layouts(shard: Shard, family: str) -> None:
    """The sharded hook points are those of the plan, with the slices of the plan."""
    engine = shard.engine(family)
    found = {
        str(point).removeprefix("model.layers.0."): (layout.axis, layout.sizes)
        for point, layout in engine._model._layouts.items()
        if point.path.startswith("model.layers.0.") or "layers" not in point.path
        if not point.operation
    }
    assert found == LAYOUTS[family]


#: Which hook points lie in slices, along which axis and of which sizes.
LAYOUTS: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {
    "llama": {
        **{f"self_attn.{port}": (-3, (2, 2)) for port in ("query", "scores", "pattern", "result")},
        **{f"self_attn.{port}": (-3, (1, 1)) for port in ("key", "value")},
        "self_attn.q_proj.output": (-1, (24, 24)),
        "self_attn.k_proj.output": (-1, (12, 12)),
        "self_attn.v_proj.output": (-1, (12, 12)),
        "self_attn.o_proj.input[args.0]": (-1, (24, 24)),
        "mlp.gate_proj.output": (-1, (40, 40)),
        "mlp.act_fn.input[args.0]": (-1, (40, 40)),
        "mlp.act_fn.output": (-1, (40, 40)),
        "mlp.up_proj.output": (-1, (40, 40)),
        "mlp.down_proj.input[args.0]": (-1, (40, 40)),
    },
    "qwen3_6": {
        **{
            f"self_attn.{port}": (-3, (2, 2, 2))
            for port in ("query", "scores", "pattern", "result")
        },
        **{f"self_attn.{port}": (-3, (1, 1, 1)) for port in ("key", "value")},
        "self_attn.q_proj.output": (-1, (16, 16, 16)),
        "self_attn.q_norm.input[args.0]": (-2, (2, 2, 2)),
        "self_attn.q_norm.output": (-2, (2, 2, 2)),
        "self_attn.k_proj.output": (-1, (8, 8, 8)),
        "self_attn.k_norm.input[args.0]": (-2, (1, 1, 1)),
        "self_attn.k_norm.output": (-2, (1, 1, 1)),
        "self_attn.v_proj.output": (-1, (8, 8, 8)),
        "self_attn.o_proj.input[args.0]": (-1, (16, 16, 16)),
        "mlp.gate_proj.output": (-1, (27, 27, 26)),
        "mlp.act_fn.input[args.0]": (-1, (27, 27, 26)),
        "mlp.act_fn.output": (-1, (27, 27, 26)),
        "mlp.up_proj.output": (-1, (27, 27, 26)),
        "mlp.down_proj.input[args.0]": (-1, (27, 27, 26)),
    },
    "phi3": {},
}


def slices(shard: Shard, family: str) -> None:
    """Tensors of any width, fused or not, travel whole from slices of unequal sizes."""
    group = ShardGroup(shard.rank, shard.world_size)
    for parts in (1, 2):
        for sizes in ((2, 2, 2), (3, 3, 1), (4, 0, 1), (0, 0, 5)):
            layout = Sharded(-2, tuple(parts * n for n in sizes), parts)
            width = sum(layout.sizes)
            for dtype in (torch.float64, torch.bfloat16, torch.float16):
                whole = torch.arange(6 * width).view(3, 1, width, 2).to(dtype)
                assert torch.equal(group.gather(group.slice(whole, layout), layout), whole)
    assert group.sizes_of([shard.rank, 7]) == [[rank, 7] for rank in range(shard.world_size)]


def generations(shard: Shard, family: str) -> None:
    """Generations of several requests, touched on their way and not, equal those of one process."""
    driver = Driver(shard.engine(family))
    requests = {"first": touching_steps(family), "second": plain([5, 6]), "third": plain(EIFFEL)}
    for name, request in requests.items():
        driver.start(name, request, 5)
        driver.step()
    driver.swap_out("second")
    driver.step()
    driver.swap_in("second")
    outcomes = driver.finish()

    for name, request in requests.items():
        saved, tokens = shard.oracle(family).generate(request.invokes, request.recorder.graph(), 5)
        if shard.rank == 0:
            assert_equal(outcomes[name].saved, saved, EXACT)
        assert outcomes[name].tokens == tokens
    driver.start("sampled", plain(EIFFEL), 8, temperature=1.5, seed=5)
    assert len(driver.finish()["sampled"].tokens[0]) == 8


def half_precision(shard: Shard, family: str) -> None:
    recorder = Recorder()
    value = recorder.read("model.layers.1.mlp.gate_proj.output")
    recorder.write("model.layers.1.mlp.gate_proj.output", recorder.apply("mul", value, 0.5))
    recorder.save(recorder.read("model.layers.1.mlp.down_proj.input[args.0]"))
    shard.check(family, [Request(recorder, [[EIFFEL]])], "bfloat16", tolerance=0.1)


def smollm2(shard: Shard, family: str) -> None:
    requests = []
    for ids in SMOLLM2_PROMPTS:
        recorder = Recorder()
        heads = recorder.read("model.layers.20.self_attn.o_proj.input[args.0]")
        recorder.write("model.layers.20.self_attn.o_proj.input[args.0]", heads)
        for hook in ("model.layers.10.mlp.gate_proj.output", "model.layers.10.output"):
            recorder.save(recorder.read(hook))
        recorder.save(recorder.read("output[logits]"))
        requests.append(Request(recorder, [[ids]]))
    # Activations of SmolLM2 reach 10,000 and more; its logits lie around 30.
    results, buffers = run(shard.engine(family, "float32"), requests)
    for request, result in zip(requests, results, strict=False):
        wanted, values = request.on(shard.oracle(family, "float32")), saved(result, buffers)
        last = max(wanted)
        assert_equal({0: values[last]}, {0: wanted[last]}, 2e-4)
        for node, value in values.items():
            torch.testing.assert_close(value, wanted[node], rtol=1e-4, atol=1e-3)


CASES: dict[str, Callable[[Shard, str], Any]] = {
    case.__name__: case
    for case in (
        layouts,
        hook_points,
        writes,
        experiments,
        parameters,
        module_calls,
        failures,
        gradients,
        conditions,
        held_values,
        generations,
        slices,
        half_precision,
        smollm2,
    )
}
