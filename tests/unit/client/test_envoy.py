"""Modules are found, shown, read, written and called without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ndif_client import Envoy, Session
from ndif_client.errors import ClosedTraceError, GraphError, OrderError, UnknownNameError
from ndif_client.outputs import HookTuple
from ndif_client.wire.graph import (
    CallModule,
    HookPoint,
    Items,
    Parameter,
    ReadHook,
    Ref,
    WriteHook,
)
from ndif_client.wire.messages import HookInfo, ModuleInfo
from tests.unit.client.trees import NUM_LAYERS, finished_graph, scratch


def _reads(trace: Any) -> list[str]:
    return [str(n.hook) for n in finished_graph(trace).nodes if isinstance(n, ReadHook)]


def _writes(trace: Any) -> list[str]:
    return [str(n.hook) for n in finished_graph(trace).nodes if isinstance(n, WriteHook)]


# ---------------------------------------------------------------- finding modules


def test_a_model_is_shown_as_torch_would_with_equal_layers_folded(model: Any) -> None:
    assert repr(model) == "\n".join(
        [
            "TinyForCausalLM(",
            "  (model): TinyModel(",
            "    (embed_tokens): Embedding(11, 6)",
            "    (layers): ModuleList(",
            "      (0-2): 3 x DecoderLayer(",
            "        (self_attn): Attention()",
            "        (mixer): Mixer()",
            "        (mlp): MLP()",
            "      )",
            "    )",
            "    (norm): RMSNorm((6,))",
            "  )",
            "  (lm_head): Linear(in_features=6)",
            ")",
        ]
    )


def test_the_text_of_a_tree_is_the_text_of_the_torch_model() -> None:
    inner = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.GELU(), torch.nn.GELU()])
    real = torch.nn.ModuleDict({"mlp": inner, "layers": layers, "drop": torch.nn.Dropout(0.1)})

    def described(name: str, module: torch.nn.Module) -> ModuleInfo:
        children = [described(child, sub) for child, sub in module.named_children()]
        kind, extra = type(module).__name__, module.extra_repr()
        return ModuleInfo(name=name, kind=kind, extra=extra, children=children)

    assert repr(Envoy(described("", real))) == repr(real)


def test_a_model_is_shown_as_foldable_html(model: Any) -> None:
    html = model._repr_html_()

    assert html.count("<details") == html.count("</details>")
    assert "(0-2): 3 x <b>DecoderLayer</b>" in html


def test_layers_are_a_list(model: Any) -> None:
    layers = model.model.layers

    assert len(layers) == NUM_LAYERS
    assert [layer._path for layer in layers] == [f"model.layers.{n}" for n in range(NUM_LAYERS)]
    assert layers[-1]._path == "model.layers.2"
    assert [layer._path for layer in layers[1:]] == ["model.layers.1", "model.layers.2"]
    with pytest.raises(UnknownNameError, match=r"model\.layers\[3\]: it has 3 items \(0 to 2\)"):
        layers[3]
    with pytest.raises(GraphError, match="not a list of modules"):
        iter(model.model)


def test_a_module_is_found_by_its_path(model: Any) -> None:
    assert model["model.layers.1.mlp"]._path == "model.layers.1.mlp"


def test_a_misspelt_module_suggests_the_right_one_and_lists_what_there_is(model: Any) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'layers'") as refused:
        _ = model.model.layer
    assert "embed_tokens, layers, norm" in str(refused.value)
    assert not hasattr(model, "transformer")
    with pytest.raises(UnknownNameError, match="did you mean 'output'"):
        model.lm_head.ouput = 0


def test_completion_offers_children_parameters_and_hook_points(model: Any) -> None:
    assert {"embed_tokens", "layers", "norm", "output", "input"} <= set(dir(model.model))
    assert "weight" in dir(model.lm_head)


# ---------------------------------------------------------------- reading


def test_what_has_not_changed_is_read_once(session: Session, model: Any) -> None:
    with scratch(session) as trace:
        _ = model.model.layers[0].output
        _ = model.model.layers[0].output
        model.model.layers[0].output = 0
        _ = model.model.layers[0].output

    assert _reads(trace) == ["model.layers.0.output"] * 2


def test_the_input_is_the_first_tensor_a_module_is_called_with(
    session: Session, model: Any
) -> None:
    with scratch(session) as trace:
        _ = model.model.layers[0].input
        _ = model.model.layers[0].self_attn.input

    assert _reads(trace) == [
        "model.layers.0.input[args.0]",
        "model.layers.0.self_attn.input[kwargs.hidden_states]",
    ]


def test_all_inputs_are_found_by_place_and_name(session: Session, model: Any) -> None:
    attention = model.model.layers[0].self_attn

    with scratch(session) as trace:
        attention.inputs.kwargs["hidden_states"]
        attention.inputs.kwargs.rotary[1]
        attention.inputs[1]["rotary"][0]
        model.model.layers[0].inputs.args[0]
        with pytest.raises(UnknownNameError, match=r"has no tensor at 'args'; it has \.kwargs"):
            attention.inputs["args"]

    assert _reads(trace) == [
        "model.layers.0.self_attn.input[kwargs.hidden_states]",
        "model.layers.0.self_attn.input[kwargs.rotary.1]",
        "model.layers.0.self_attn.input[kwargs.rotary.0]",
        "model.layers.0.input[args.0]",
    ]


def test_a_tuple_output_is_indexed_as_in_transformers(session: Session, model: Any) -> None:
    with scratch(session) as trace:
        model.model.layers[0].self_attn.output[0]
        model.model.layers[0].mixer.output[1][0]
        assert len(model.model.layers[0].mixer.output) == 2

    assert _reads(trace) == [
        "model.layers.0.self_attn.output[0]",
        "model.layers.0.mixer.output[1.0]",
    ]


def test_a_field_of_an_output_is_an_attribute_or_an_item(session: Session, model: Any) -> None:
    with scratch(session) as trace:
        _ = model.output.logits
        model.output["logits"]
        model.output[0]
        with pytest.raises(UnknownNameError, match=r"it has \.logits"):
            model.output["hidden_states"]

    assert _reads(trace) == ["output[logits]"]


def test_a_sole_tensor_in_a_tuple_can_be_used_as_the_output_itself(
    session: Session, model: Any
) -> None:
    attention = model.model.layers[0].self_attn

    with scratch(session) as trace:
        (attention.output + 1).save()
        (torch.ones(6) * attention.output).save()
        torch.softmax(attention.output, -1).save()
        attention.output[:, -1].save()
        attention.output.mean(-1).save()
        attention.output.save()

    assert _reads(trace) == ["model.layers.0.self_attn.output[0]"]


def test_an_output_of_several_tensors_must_be_told_apart(session: Session, model: Any) -> None:
    with scratch(session):
        output = model.model.layers[0].mixer.output
        assert isinstance(output, HookTuple)
        assert "1.1: float32[batch, sequence, 6]" in repr(output)
        with pytest.raises(GraphError, match=r"several tensors, take one of them: \[0\], \[1\]"):
            output + 1
        with pytest.raises(GraphError, match="several tensors"):
            output.save()
        with pytest.raises(GraphError, match=r"mixer\.output has no 'mean'"):
            output.mean()


def test_a_module_that_is_not_called_has_no_output(session: Session, model: Any) -> None:
    with scratch(session), pytest.raises(GraphError, match="use one of its items"):
        _ = model.model.layers.output


def test_a_module_called_twice_is_read_at_each_call(session: Session) -> None:
    hooks = [
        HookInfo(port="output", call=call, shape=["batch"], dtype="float32", order=call)
        for call in range(2)
    ]
    shared = Envoy(ModuleInfo(name="shared", kind="Shared", hooks=hooks), "shared")

    with scratch(session) as trace:
        _ = shared.output
        _ = shared.at_call(1).output
        with pytest.raises(GraphError, match=r"called 2 time\(s\)"):
            shared.at_call(2)

    assert _reads(trace) == ["shared.output", "shared.output (call 1)"]


def test_a_parameter_is_recorded_once(session: Session, model: Any) -> None:
    with scratch(session) as trace:
        (model.lm_head.weight[3] + model.lm_head.weight[4]).save()
    parameters = [n for n in finished_graph(trace).nodes if isinstance(n, Parameter)]

    assert parameters == [Parameter("lm_head.weight")]
    with pytest.raises(ClosedTraceError):
        _ = model.lm_head.weight


# ---------------------------------------------------------------- writing


def test_assigning_an_output_writes_it(session: Session, model: Any) -> None:
    with scratch(session) as trace:
        model.model.layers[0].output = 0
        model.model.layers[1].output = torch.ones(6)
        model.model.layers[1].input = model.model.layers[0].output
        model.model.layers[1].self_attn.output = 1.5
        model.output.logits = 0
        model.model.layers[2].self_attn.inputs.kwargs["hidden_states"] = 0
        model.model.layers[2].mixer.output[1][0] = 0

    assert _writes(trace) == [
        "model.layers.0.output",
        "model.layers.1.output",
        "model.layers.1.input[args.0]",
        "model.layers.1.self_attn.output[0]",
        "output[logits]",
        "model.layers.2.self_attn.input[kwargs.hidden_states]",
        "model.layers.2.mixer.output[1.0]",
    ]


def test_a_tuple_output_is_replaced_by_a_tuple(session: Session, model: Any) -> None:
    with scratch(session) as trace:
        attention = model.model.layers[0].self_attn
        attention.output = (attention.output[0] * 2, None)
        with pytest.raises(GraphError, match="has no tensor at 1"):
            attention.output = (0, 0)

    assert _writes(trace) == ["model.layers.0.self_attn.output[0]"]


def test_modules_and_parameters_can_not_be_replaced(session: Session, model: Any) -> None:
    with scratch(session):
        with pytest.raises(GraphError, match=r"lm_head belongs to the model"):
            model.lm_head = 0
        with pytest.raises(GraphError, match=r"lm_head\.weight belongs to the model"):
            model.lm_head.weight = 0
        with pytest.raises(GraphError, match="write one of the inputs"):
            model.lm_head.inputs = 0


def test_a_value_that_comes_too_late_is_refused_with_both_lines(
    session: Session, model: Any
) -> None:
    with scratch(session):
        late = model.model.layers[2].output * 2  # read here
        model.model.layers[2].output = late
        with pytest.raises(OrderError) as refused:
            model.model.layers[0].mlp.output[:, 0] = late[:, 0]  # written here

    text = str(refused.value)
    assert "model.layers.0.mlp.output is written with a value that needs model.layers.2" in text
    assert "read here" in text
    assert "written here" in text
    assert refused.value.fault is not None
    assert refused.value.fault.other_source is not None


# ---------------------------------------------------------------- calling


def test_calling_a_module_on_values_records_a_call(session: Session, model: Any) -> None:
    with scratch(session) as trace:
        model.lm_head(model.model.norm(model.model.layers[0].output), scale=2.0).save()
    calls = [n for n in finished_graph(trace).nodes if isinstance(n, CallModule)]

    assert calls == [
        CallModule("model.norm", [Ref(0)]),
        CallModule("lm_head", [Ref(1)], {"scale": 2.0}),
    ]


def test_an_output_stands_for_its_value_in_a_call(session: Session, model: Any) -> None:
    with scratch(session) as trace:
        model.model.norm(model.model.layers[0].self_attn.output).save()

    assert _reads(trace) == ["model.layers.0.self_attn.output[0]"]


def test_a_list_of_values_can_be_passed(session: Session, model: Any) -> None:
    with scratch(session) as trace:
        h = model.model.layers[0].output
        model.model.norm([h, h]).save()
    (call,) = [n for n in finished_graph(trace).nodes if isinstance(n, CallModule)]

    assert call.args == [Items([Ref(0), Ref(0)])]


def test_hook_points_are_addressed_as_the_wire_says(session: Session, model: Any) -> None:
    with scratch(session) as trace:
        model.model.layers[1].self_attn.output[0]
    (read,) = [n for n in finished_graph(trace).nodes if isinstance(n, ReadHook)]

    assert read == ReadHook(HookPoint("model.layers.1.self_attn", "output", "0"), 0)
