"""Low-rank adapters on linear modules (Hu et al. 2021, "LoRA"), in the format of PEFT.

    lora = await LoRA.create(session, ["model.layers.*.self_attn.q_proj"], rank=8, seed=0)
    with session.trace(prompt):
        lora.apply()                       # before anything that is to see it
        ...
    optim.AdamW(lora.parameters)           # trains it; see `optim`
    await lora.save(session, "adapter/")

The model's own weights are not touched: what an adapter adds to a module's output is added in the
rows of its own user alone, so users with different adapters share forwards.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ndif_client import ops
from ndif_client.caching import Modules, find_modules
from ndif_client.envoy import Envoy
from ndif_client.errors import NdifError, graph_error
from ndif_client.held import Handle
from ndif_client.wire.messages import ModuleInfo

if TYPE_CHECKING:
    from ndif_client.session import Session

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


class LoRA:
    """An adapter whose factors the server holds.

    Attributes:
        factors: for each module's path, the handles of A `[rank, in]` and B `[out, rank]`.
        scaling: what the product is multiplied with: alpha / rank.
    """

    def __init__(
        self, model: Envoy, factors: dict[str, tuple[Handle, Handle]], rank: int, alpha: float
    ) -> None:
        self.factors = factors
        self.rank = rank
        self.alpha = alpha
        self._model = model

    @classmethod
    async def create(
        cls,
        session: Session,
        modules: Modules,
        *,
        rank: int = 8,
        alpha: float | None = None,
        seed: int = 0,
        name: str = "lora",
    ) -> LoRA:
        """Make a fresh adapter: A random as in PEFT (uniform), B zero.

        Args:
            session: that is to hold it.
            modules: linear modules, their paths, or patterns such as "model.layers.*.mlp.up_proj".
            rank: of the product.
            alpha: the product is scaled by alpha / rank; by default by 1.
            seed: of A.
            name: its factors are held as `name.path.A` and `name.path.B`.

        Raises:
            GraphError: one of the modules is not linear.
        """
        generator = np.random.default_rng(seed)
        factors = {}
        for path, module in find_modules(session.model, modules).items():
            rows, columns = _shape(path, module._info)
            bound = 1 / math.sqrt(columns)  # kaiming_uniform_(a=sqrt(5)), as PEFT has it
            first = generator.uniform(-bound, bound, (rank, columns)).astype(np.float32)
            factors[path] = (
                await session.upload(first, f"{name}.{path}.A"),
                await session.upload(np.zeros((rows, rank), np.float32), f"{name}.{path}.B"),
            )
        return cls(session.model, factors, rank, rank if alpha is None else alpha)

    @classmethod
    async def load(
        cls, session: Session, folder: str | os.PathLike[str], *, name: str | None = None
    ) -> LoRA:
        """Upload an adapter that PEFT has saved.

        Args:
            session: that is to hold it.
            folder: with adapter_config.json and adapter_model.safetensors.
            name: what its factors are held as; by default the name of the folder.

        Raises:
            OSError, TensorFileError: the files can't be read.
            NdifError: it is no plain LoRA adapter of this model.
        """
        place = Path(folder)
        config = json.loads((place / _CONFIG).read_text())
        unknown = [key for key in ("use_dora", "use_rslora") if config.get(key)]
        if config.get("peft_type") != "LORA" or unknown:
            what = ", ".join(unknown) or config.get("peft_type")
            raise NdifError(f"{place} is no plain LoRA adapter ({what})")
        prefix = f"{name or place.name}/"
        handles = await session.upload_file(place / _WEIGHTS, prefix)
        factors = {}
        for key, first in handles.items():
            if not key.endswith(".lora_A.weight"):
                continue
            stem = key.removesuffix(".lora_A.weight")
            path = stem.removeprefix(_PREFIX)
            _shape(path, session.model[path]._info)  # refuses what this model does not have
            factors[path] = (first, handles[f"{stem}.lora_B.weight"])
        if not factors:
            raise NdifError(f"{place / _WEIGHTS} holds no factors of linear modules")
        return cls(session.model, factors, int(config["r"]), float(config["lora_alpha"]))

    @property
    def scaling(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.alpha / self.rank

    @property
    def parameters(self) -> list[Handle]:
        """All factors, to be given to an optimiser."""
        return [factor for pair in self.factors.values() for factor in pair]

    def apply(self, *, dropout: float = 0.0) -> None:
        """Record that the adapter takes part, in this invoke and these steps.

        What is read after that sees it. In training, `dropout` is what enters it.
        """
        for path, (first, second) in self.factors.items():
            module = self._model[path]
            entered = module.input
            if dropout:
                entered = entered.to("float32").dropout(dropout)
            module.output = ops.low_rank(module.output, entered, first, second, self.scaling)

    async def save(self, session: Session, folder: str | os.PathLike[str]) -> None:
        """Write it as PEFT does, to be loaded there or here."""
        place = Path(folder)
        os.makedirs(place, exist_ok=True)
        named: dict[str, Handle | str] = {}
        for path, (first, second) in self.factors.items():
            named[f"{_PREFIX}{path}.lora_A.weight"] = first
            named[f"{_PREFIX}{path}.lora_B.weight"] = second
        await session.download(named, place / _WEIGHTS)
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "base_model_name_or_path": session.tree.id,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": _targets(self.factors),
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
        }
        (place / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _targets(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(paths))


def _shape(path: str, info: ModuleInfo) -> tuple[int, int]:
    """Return the sizes of a linear module: out and in."""
    weight = next((p for p in info.parameters if p.name == "weight" and len(p.shape) == 2), None)
    if weight is None or info.children or info.kind == "Embedding":
        raise graph_error(f"{path} ({info.kind}) is no linear module, so it takes no adapter")
    rows, columns = weight.shape
    return (columns, rows) if info.kind == "Conv1D" else (rows, columns)
