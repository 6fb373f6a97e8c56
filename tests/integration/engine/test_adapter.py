"""What we rely on in transformers, so that a new version that breaks it is noticed here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, BertModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask

from ndif_actor.engine import adapter, attention
from ndif_actor.engine.blueprint import Blueprint
from ndif_actor.engine.engine import Engine
from ndif_actor.errors import ModelError
from tests.conftest import MakeModel
from tests.models import CONFIGS


def test_transformers_finds_the_ragged_attention_and_its_mask_by_name() -> None:
    assert AttentionInterface()[attention.IMPLEMENTATION] is attention.ragged_attention
    assert attention.IMPLEMENTATION in AttentionMaskInterface().valid_keys()


def test_a_mask_of_four_dimensions_passes_through_transformers() -> None:
    config = CONFIGS["llama"]()
    config._attn_implementation = attention.IMPLEMENTATION
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.int64)

    passed = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, 5, 48),
        attention_mask=mask,
        past_key_values=None,
        position_ids=torch.tensor([[0, 1, 0, 1, 2]]),
    )

    assert passed is mask


def test_every_attention_module_of_a_block_attends_once(model_folder: MakeModel) -> None:
    model = adapter.build_without_weights(CONFIGS["gemma3"](), torch.float32)
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")

    layout = attention.AttentionLayout([attention.Segments(0, 1, 4)])
    with attention.attending(layout) as record, torch.no_grad():
        adapter.run_packed(model, ids, ids)

    assert [one.module for one in record.attended] == [
        layer.self_attn for layer in model.model.layers
    ]


def test_the_tensor_parallel_plan_of_llama_is_the_one_layouts_were_learned_from() -> None:
    model = adapter.build_without_weights(CONFIGS["llama"](), torch.float32)

    plan = {name.removeprefix("model.layers.*."): how for name, how in model.tp_plan.items()}

    assert plan == {
        "model.embed_tokens": "embedding_rowwise",  # overridden by ours
        "self_attn.q_proj": "colwise",
        "self_attn.k_proj": "colwise",
        "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise",
        "mlp.gate_proj": "colwise",
        "mlp.up_proj": "colwise",
        "mlp.down_proj": "rowwise",
        "lm_head": "colwise_gather_output",
    }
    assert DistributedConfig(tp_size=2, tp_plan={"model.embed_tokens": "replicate"}).tp_size == 2


def test_phi3_shows_whole_tensors_between_its_sharded_modules() -> None:
    plan = adapter.build_without_weights(CONFIGS["phi3"](), torch.float32).tp_plan

    assert plan["model.layers.*.self_attn.qkv_proj"] == "colwise_gather_output"
    assert plan["model.layers.*.self_attn.o_proj"] == "rowwise_split_input"
    assert plan["model.layers.*.mlp.gate_up_proj"] == "colwise_gather_output"
    assert plan["model.layers.*.mlp.down_proj"] == "rowwise_split_input"


def test_modules_that_a_plan_shards_packed_are_found_by_its_patterns() -> None:
    model = adapter.build_without_weights(CONFIGS["phi3"](), torch.float32)
    plan = {"model.layers.*.mlp.gate_up_proj": "packed_colwise", "lm_head": "colwise"}

    model.tp_plan = plan

    assert adapter.shard_factors(model) == {
        f"model.layers.{n}.mlp.gate_up_proj": 2 for n in (0, 1, 2)
    }


def test_a_model_without_weights_allocates_nothing() -> None:
    model = adapter.build_without_weights(CONFIGS["qwen3_moe"](), torch.bfloat16)

    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.bfloat16


def test_weights_load_in_the_dtype_asked_for_and_never_train(model_folder: MakeModel) -> None:
    folder = model_folder("llama", torch.float32)

    model = adapter.load_shard(folder, torch.bfloat16, torch.device("cpu"), 1)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert Blueprint.load(folder, "auto", 1).config_dtype == "float32"
    assert Blueprint.load(folder, "auto", 1).model.dtype == torch.float32


# ---------------------------------------------------------------- refused before loading


def config_only(folder: Path, family: str) -> Path:
    CONFIGS[family]().save_pretrained(folder)
    return folder


def load(folder: Path, *, dtype: str = "float32", world_size: int = 1) -> Engine:
    return Engine.load(folder, dtype=dtype, device="cpu", rank=0, world_size=world_size)


@pytest.mark.parametrize(
    ("family", "world_size", "message"),
    [
        (
            "llama",
            3,
            "LlamaForCausalLM (llama) has 4 attention heads, which --tp 3 does not divide; "
            "possible degrees: 1, 2",
        ),
        (
            "llama",
            4,
            "LlamaForCausalLM (llama) has 2 key/value heads, which --tp 4 does not divide; "
            "possible degrees: 1, 2",
        ),
        (
            "llama6",
            2,
            "LlamaForCausalLM (llama) has 3 key/value heads, which --tp 2 does not divide; "
            "possible degrees: 1, 3",
        ),
        (
            "gpt2",
            2,
            "GPT2LMHeadModel (gpt2) has no tensor-parallel plan in transformers, so it is served "
            "with --tp 1 only, not --tp 2",
        ),
        (
            "mamba",
            2,
            "MambaForCausalLM (mamba) has no tensor-parallel plan in transformers, so it is "
            "served with --tp 1 only, not --tp 2",
        ),
    ],
)
def test_a_degree_that_a_model_can_not_be_split_in_is_refused_before_a_weight_is_read(
    family: str, world_size: int, message: str, tmp_path: Path
) -> None:
    folder = config_only(tmp_path, family)  # there are no weights to read

    with pytest.raises(ModelError) as caught:
        load(folder, world_size=world_size)

    assert str(caught.value) == message


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no model transformers knows"):
        load(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be loaded"):
        load(config_only(tmp_path, "llama"))


def test_a_folder_that_lacks_some_weights_is_refused_rather_than_filled_up_with_random_ones(
    tmp_path: Path,
) -> None:
    model = BertModel(CONFIGS["bert"]())  # without the head that predicts tokens
    model.save_pretrained(tmp_path)

    with pytest.raises(ModelError, match=r"lack \d+ tensors of BertForMaskedLM: cls.predictions"):
        load(tmp_path)


def test_weights_in_a_format_that_can_run_code_are_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    config_only(tmp_path, "llama")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")

    with pytest.raises(ModelError, match="can't be loaded"):
        load(tmp_path)


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(tmp_path)

    with pytest.raises(ModelError, match="vit can't be built"):
        load(tmp_path)


def test_a_dtype_that_is_not_served_is_refused_by_name(model_folder: MakeModel) -> None:
    with pytest.raises(ModelError, match="'int8' can't be served; choose one of float64"):
        load(model_folder("llama"), dtype="int8")
