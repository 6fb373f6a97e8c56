"""Adapters of PEFT's are applied as PEFT applies them, or refused; none touches another."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ndif_client import Session, blocking, connect, errors
from ndif_client.lora import LoRA
from tests.conftest import MakeModel
from tests.integration.client.plain import Plain
from tests.integration.server.harness import running

IDS = [5, 17, 99, 250, 3]
MODULES = ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc", "transformer.h.2.mlp.c_proj"]


@pytest.fixture(scope="module")
def folder(model_folder: MakeModel) -> Path:
    return model_folder("gpt2", torch.float64)


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("server") / "log"
    with running(folder, log, "--dtype", "float64") as server:
        yield server.url


@pytest.fixture
async def session(url: str) -> AsyncIterator[Session]:
    async with connect(url, tensors="torch") as session:
        yield session


def write(folder: Path, plain: Plain, ranks: list[int], **config: Any) -> dict[str, torch.Tensor]:
    """Write an adapter of these modules as PEFT does; return its tensors."""
    folder.mkdir(exist_ok=True, parents=True)
    torch.manual_seed(len(str(folder)))
    tensors = {}
    for path, rank in zip(MODULES, ranks, strict=True):
        size_in, size_out = plain.model.get_submodule(path).weight.shape  # a Conv1D has it so
        stem = f"base_model.model.{path}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, size_in)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(size_out, rank)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": ranks[0], "lora_alpha": 4, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def by_hand(plain: Plain, tensors: dict[str, torch.Tensor], scalings: list[float]) -> torch.Tensor:
    handles = []
    for path, scaling in zip(MODULES, scalings, strict=True):
        first, second = (
            tensors[f"base_model.model.{path}.lora_{which}.weight"].double() for which in "AB"
        )

        def add(m: Any, args: Any, output: Any, a: Any = first, b: Any = second, s: Any = scaling):  # type: ignore[no-untyped-def]
            return output + args[0] @ a.mT @ b.mT * s

        handles.append(plain.model.get_submodule(path).register_forward_hook(add))
    logits = plain.run(IDS)
    for handle in handles:
        handle.remove()
    return logits


async def logits_of(session: Session, lora: LoRA) -> torch.Tensor:
    with session.trace(IDS) as trace:
        lora.apply()
        trace.logits = session.model.unembed.output
    found: torch.Tensor = (await trace).logits
    return found


@pytest.mark.parametrize(
    ("ranks", "config", "scalings"),
    [
        ([2, 2, 2], {}, [2, 2, 2]),
        ([4, 4, 4], {"use_rslora": True}, [2, 2, 2]),
        ([2, 4, 2], {"rank_pattern": {"mlp.c_fc": 4}}, [2, 1, 2]),
        (
            [2, 4, 2],
            {
                "rank_pattern": {"c_fc": 4},
                "alpha_pattern": {r"h\.[01]\..*": 6, "c_proj": 10},
                "use_rslora": True,
            },
            [6 / math.sqrt(2), 6 / 2, 10 / math.sqrt(2)],
        ),
    ],
    ids=["plain", "rank-stabilized", "rank-pattern", "all"],
)
async def test_an_adapter_is_scaled_as_its_file_says(
    session: Session,
    folder: Path,
    tmp_path: Path,
    ranks: list[int],
    config: dict[str, Any],
    scalings: list[float],
) -> None:
    plain = Plain(folder)
    wanted = by_hand(plain, write(tmp_path / "adapter", plain, ranks, **config), scalings)

    lora = await LoRA.load(session, tmp_path / "adapter")
    torch.testing.assert_close(await logits_of(session, lora), wanted, rtol=0, atol=1e-9)

    await lora.save(session, tmp_path / "again")
    again = await LoRA.load(session, tmp_path / "again")
    torch.testing.assert_close(await logits_of(session, again), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        ({"use_dora": True}, {}, "use_dora is not offered"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({"bias": "all"}, {}, "bias=all"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights=pissa"),
        ({"peft_type": "IA3"}, {}, "IA3"),
        ({"lora_alpha": None}, {}, "nobody knows the scaling"),
        ({}, {"base_model.model.transformer.wte.lora_embedding_A": (2, 4)}, "lora_embedding_A"),
        ({}, {"base_model.model.lm_head.lora_A.weight": (2, 48)}, "lm_head.lora_A"),
    ],
)
async def test_what_is_more_than_an_adapter_of_linear_modules_is_refused(
    session: Session,
    folder: Path,
    tmp_path: Path,
    config: dict[str, Any],
    more: dict[str, tuple[int, ...]],
    message: str,
) -> None:
    tensors = write(tmp_path / "adapter", Plain(folder), [2, 2, 2], **config)
    if config.get("lora_alpha", 1) is None:
        given = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        del given["lora_alpha"]
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(given))
    tensors |= {key: torch.zeros(shape) for key, shape in more.items()}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")

    with pytest.raises(errors.NdifError, match=message):
        await LoRA.load(session, tmp_path / "adapter")


async def test_adapters_without_names_do_not_replace_each_other(
    session: Session, folder: Path, tmp_path: Path
) -> None:
    plain = Plain(folder)
    wanted, loaded = [], []
    for run in ("run1", "second"):
        place = tmp_path / run / "checkpoint-10"
        wanted.append(by_hand(plain, write(place, plain, [2, 2, 2]), [2, 2, 2]))
        loaded.append(await LoRA.load(session, place))
    for lora, own in zip(loaded, wanted, strict=True):
        torch.testing.assert_close(await logits_of(session, lora), own, rtol=0, atol=1e-9)
    made = [await LoRA.create(session, MODULES, rank=2, seed=seed) for seed in (0, 1)]
    names = {handle.name for lora in made for handle in lora.parameters}
    assert len(names) == 2 * 2 * len(MODULES)


async def test_what_takes_no_adapter_is_refused(session: Session) -> None:
    with pytest.raises(errors.GraphError, match="no linear module"):
        await LoRA.create(session, "transformer.wte")
    with pytest.raises(errors.GraphError, match="the rank of an adapter is 1 at least"):
        await LoRA.create(session, MODULES, rank=0)


def test_a_script_without_await_has_adapters_too(url: str, folder: Path, tmp_path: Path) -> None:
    plain = Plain(folder)
    wanted = by_hand(plain, write(tmp_path / "adapter", plain, [2, 2, 2]), [2, 2, 2])
    with blocking.connect(url, tensors="torch") as session:
        lora = blocking.LoRA.load(session, tmp_path / "adapter")
        with session.trace(IDS) as trace:
            lora.apply()
            trace.logits = session.model.unembed.output
        torch.testing.assert_close(trace.result.logits, wanted, rtol=0, atol=1e-9)
        lora.save(session, tmp_path / "again")
        assert blocking.LoRA.create(session, MODULES, rank=3).ranks[MODULES[0]] == 3
        with pytest.raises(errors.GraphError, match=r"ndif_client\.blocking\.LoRA"):
            session.wait(LoRA.load(session, tmp_path / "again"))  # type: ignore[arg-type]
