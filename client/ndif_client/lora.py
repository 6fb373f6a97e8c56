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
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ndif_client import ops
from ndif_client.caching import Modules, find_modules
from ndif_client.envoy import Envoy
from ndif_client.errors import NdifError, graph_error
from ndif_client.held import Handle
from ndif_client.wire.messages import ModuleInfo
from ndif_client.wire.tensors import TensorSpec

if TYPE_CHECKING:
    from ndif_client.session import Session

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."

#: Keys that an error lists.
_SHOWN = 4

#: What PEFT's adapters may also be, and is not offered: keys of their configuration.
_OTHER_KINDS = (
    "use_dora", "use_qalora", "alora_invocation_tokens", "modules_to_save",
    "trainable_token_indices", "layer_replication", "megatron_config", "arrow_config",
    "lora_bias", "target_parameters",
)  # fmt: skip

#: Ways to begin that change the model's own weights, which are not in the adapter.
_CHANGES_MODEL = re.compile("pissa|olora|loftq|corda", re.IGNORECASE)


class LoRA:
    """An adapter whose factors the server holds.

    Attributes:
        factors: for each module's path, the handles of A `[rank, in]` and B `[out, rank]`.
        alphas: for each module's path, what the product is scaled by, times its rank, or, if
            `rank_stabilized`, times the root of its rank (Kalajdzievski 2023, "rsLoRA").
    """

    def __init__(
        self,
        model: Envoy,
        factors: dict[str, tuple[Handle, Handle]],
        ranks: Mapping[str, int],
        alphas: Mapping[str, float],
        *,
        rank_stabilized: bool = False,
    ) -> None:
        self.factors = factors
        self.ranks = dict(ranks)
        self.alphas = dict(alphas)
        self.rank_stabilized = rank_stabilized
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
        name: str | None = None,
    ) -> LoRA:
        """Make a fresh adapter: A random as in PEFT (uniform), B zero.

        Args:
            session: that is to hold it.
            modules: linear modules, their paths, or patterns such as "model.layers.*.mlp.up_proj".
            rank: of the product.
            alpha: the product is scaled by alpha / rank; by default by 1.
            seed: of A.
            name: its factors are held as `name.path.A` and `name.path.B`; by default they have no
                names, and are held for as long as the adapter is there.

        Raises:
            GraphError: one of the modules is not linear, or the rank is none.
        """
        _check_session(session)
        if rank < 1:
            raise graph_error(f"rank={rank}: the rank of an adapter is 1 at least")
        generator = np.random.default_rng(seed)
        factors = {}
        for path, module in find_modules(session.model, modules).items():
            rows, columns = _shape(path, module._info)
            bound = 1 / math.sqrt(columns)  # kaiming_uniform_(a=sqrt(5)), as PEFT has it
            first = generator.uniform(-bound, bound, (rank, columns)).astype(np.float32)
            second = np.zeros((rows, rank), np.float32)
            factors[path] = (
                await session.upload(first, name and f"{name}.{path}.A"),
                await session.upload(second, name and f"{name}.{path}.B"),
            )
        alphas = dict.fromkeys(factors, float(rank if alpha is None else alpha))
        return cls(session.model, factors, dict.fromkeys(factors, rank), alphas)

    @classmethod
    async def load(
        cls, session: Session, folder: str | os.PathLike[str], *, name: str | None = None
    ) -> LoRA:
        """Upload an adapter that PEFT has saved.

        Args:
            session: that is to hold it.
            folder: with adapter_config.json and adapter_model.safetensors.
            name: its factors are held as `name/key`, by their keys in the file; by default they
                have no names, and are held for as long as the adapter is there.

        Raises:
            OSError, TensorFileError: the files can't be read.
            NdifError: it is no LoRA adapter of this model, or has parts that are not offered.
        """
        _check_session(session)
        place = Path(folder)
        config = json.loads((place / _CONFIG).read_text())
        _check_kind(place, config)
        handles = await session.upload_file(place / _WEIGHTS, name and f"{name}/")
        factors: dict[str, tuple[Handle, Handle]] = {}
        left = dict(handles)
        for key in handles:
            stem = key.removesuffix(".lora_A.weight")
            if stem == key or f"{stem}.lora_B.weight" not in handles:
                continue
            path = stem.removeprefix(_PREFIX)
            _shape(path, session.model[path]._info)  # refuses what this model does not have
            factors[path] = left.pop(key), left.pop(f"{stem}.lora_B.weight")
        if left or not factors:
            shown = ", ".join(list(left)[:_SHOWN]) or "nothing"
            raise NdifError(
                f"{place / _WEIGHTS} holds what is no pair of factors of a linear module: {shown}"
            )
        ranks = {path: _rank(session, first) for path, (first, _) in factors.items()}
        patterns = config.get("alpha_pattern") or {}
        alphas = {path: _by_pattern(path, patterns, config["lora_alpha"]) for path in factors}
        stabilized = bool(config.get("use_rslora"))
        return cls(session.model, factors, ranks, alphas, rank_stabilized=stabilized)

    def scaling(self, path: str) -> float:
        """Return what the product of the factors of a module is multiplied with."""
        rank = self.ranks[path]
        return self.alphas[path] / (math.sqrt(rank) if self.rank_stabilized else rank)

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
            scaling = self.scaling(path)
            module.output = ops.low_rank(module.output, entered, first, second, scaling)

    async def save(self, session: Session, folder: str | os.PathLike[str]) -> None:
        """Write it as PEFT does, to be loaded there or here."""
        place = Path(folder)
        os.makedirs(place, exist_ok=True)
        named: dict[str, Handle | str] = {}
        for path, (first, second) in self.factors.items():
            named[f"{_PREFIX}{path}.lora_A.weight"] = first
            named[f"{_PREFIX}{path}.lora_B.weight"] = second
        await session.download(named, place / _WEIGHTS)
        rank, other_ranks = _most(self.ranks)
        alpha, other_alphas = _most(self.alphas)
        kinds = {self._model[path]._info.kind for path in self.factors}
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "base_model_name_or_path": session.tree.id,
            "r": rank,
            "rank_pattern": other_ranks,
            "lora_alpha": alpha,
            "alpha_pattern": other_alphas,
            "use_rslora": self.rank_stabilized,
            "fan_in_fan_out": kinds == {"Conv1D"},
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": list(self.factors),
            "task_type": "CAUSAL_LM",
            "inference_mode": True,
        }
        (place / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _check_session(session: Any) -> None:
    if not hasattr(type(session), "trace") or hasattr(type(session), "together"):
        raise graph_error("a session that blocks has adapters by ndif_client.blocking.LoRA")


def _check_kind(place: Path, config: Mapping[str, Any]) -> None:
    """Refuse what is more, or something else, than low-rank factors of linear modules."""
    found = [key for key in _OTHER_KINDS if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append(f"bias={config['bias']}")
    if _CHANGES_MODEL.match(str(config.get("init_lora_weights"))):
        found.append(f"init_lora_weights={config['init_lora_weights']}")
    if config.get("peft_type") != "LORA":
        found.insert(0, str(config.get("peft_type")))
    if found:
        raise NdifError(f"{place} is no plain LoRA adapter: {', '.join(found)} is not offered")
    if "lora_alpha" not in config:
        raise NdifError(f"{place / _CONFIG} has no lora_alpha, so nobody knows the scaling")


def _by_pattern(path: str, patterns: Mapping[str, float], otherwise: float) -> float:
    """Return what a pattern of PEFT's says of a module: a regular expression of its path's end."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(value)
    return float(otherwise)


def _rank(session: Session, first: Handle) -> int:
    spec = session._holder.spec(first.name)
    assert isinstance(spec, TensorSpec)
    return spec.shape[0]


def _most(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the commonest of some values, and the others by their keys."""
    ((common, _),) = Counter(values.values()).most_common(1)
    others = {re.escape(path): value for path, value in values.items() if value != common}
    return common, others


def _shape(path: str, info: ModuleInfo) -> tuple[int, int]:
    """Return the sizes of a linear module: out and in."""
    weight = next((p for p in info.parameters if p.name == "weight" and len(p.shape) == 2), None)
    is_linear = info.kind.endswith("Linear") or info.kind == "Conv1D"
    if weight is None or not is_linear:
        raise graph_error(f"{path} ({info.kind}) is no linear module, so it takes no adapter")
    rows, columns = weight.shape
    return (columns, rows) if info.kind == "Conv1D" else (rows, columns)
