"""How long a modelled forward takes: fitted to measured ones, or derived from the hardware."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np


class Load(msgspec.Struct, frozen=True):
    """What one forward carries.

    Attributes:
        rows: tokens fed.
        requests: how many share it.
        context: tokens in the KV cache that its rows attend to.
        differentiated: whether a backward follows.
    """

    rows: int
    requests: int
    context: int = 0
    differentiated: bool = False


class ForwardCost(msgspec.Struct, frozen=True, kw_only=True):
    """A forward takes the longer of reading the weights and computing its rows, and some more.

    Attributes:
        base_s: of every forward: launches, collectives, bookkeeping.
        weights_s: reading all weights once.
        row_s: arithmetic of one row.
        request_s: interleaving one request and handing its results out.
        context_s: reading one token of the KV cache.
        backward_factor: what a backward takes, in times of the arithmetic of the forward.
    """

    base_s: float
    weights_s: float
    row_s: float
    request_s: float
    context_s: float = 0.0
    backward_factor: float = 2.0

    def seconds(self, load: Load) -> float:
        """Return how long a forward takes."""
        passes = 1 + (self.backward_factor if load.differentiated else 0)
        arithmetic = max(self.weights_s, load.rows * self.row_s) * passes
        return (
            self.base_s
            + arithmetic
            + load.requests * self.request_s
            + load.context * self.context_s
        )

    @property
    def most_rows_per_s(self) -> float:
        """Rows a second that no scheduler can exceed."""
        return 1 / self.row_s


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """Devices that share a model by tensor parallelism; the defaults are an H100 SXM's.

    Attributes:
        devices: how many.
        flops: dense bfloat16 operations a second of one device.
        efficiency: the part of them that a large matrix product reaches.
        bandwidth: bytes a second that one device reads from its memory.
        memory: bytes of one device.
        reduce_s: one all-reduce of a few rows.
    """

    devices: int
    flops: float = 989e12
    efficiency: float = 0.4
    bandwidth: float = 3.35e12
    memory: float = 80e9
    reduce_s: float = 40e-6


class ModelSize(msgspec.Struct, frozen=True, kw_only=True):
    """What a forward of a dense decoder depends on; `bytes_each` is of one number."""

    parameters: float
    layers: int
    kv_heads: int
    head_dim: int
    bytes_each: int = 2

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token in the KV cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_each


def roofline(model: ModelSize, hardware: Hardware, request_s: float) -> ForwardCost:
    """Return the cost that the hardware's rates allow (Williams et al. 2009); nothing is measured.

    Args:
        model: its size.
        hardware: what runs it.
        request_s: see `ForwardCost`; to be taken from a measurement of this server.
    """
    together = hardware.devices * hardware.bandwidth
    return ForwardCost(
        base_s=2 * model.layers * hardware.reduce_s,
        weights_s=model.parameters * model.bytes_each / together,
        row_s=2 * model.parameters / (hardware.devices * hardware.flops * hardware.efficiency),
        request_s=request_s,
        context_s=model.kv_bytes / together,
    )


def cache_tokens(model: ModelSize, hardware: Hardware, share: float = 0.8) -> int:
    """Return how many tokens of KV cache fit beside the weights, in a share of what is left."""
    left = hardware.devices * hardware.memory - model.parameters * model.bytes_each
    return max(0, int(left * share / model.kv_bytes))


class Sample(msgspec.Struct, frozen=True):
    """One measured forward."""

    load: Load
    seconds: float


def fit(samples: Sequence[Sample]) -> ForwardCost:
    """Fit the cost of forwards without a backward to measured ones, by least squares.

    The time of reading the weights can't be told from other work of every forward in such samples:
    it is part of `base_s`. No part is negative.

    Raises:
        ValueError: fewer than three samples, or all of the same size.
    """
    if len(samples) < 3:
        raise ValueError(f"{len(samples)} forwards were measured; at least 3 are needed")
    columns = np.array([[1.0, s.load.rows, s.load.requests] for s in samples])
    if np.ptp(columns[:, 1]) == 0:
        raise ValueError("all measured forwards have as many rows; measure several sizes")
    base, row, request = _non_negative(columns, np.array([s.seconds for s in samples]))
    return ForwardCost(base_s=base, weights_s=0.0, row_s=row, request_s=request)


def _non_negative(columns: np.ndarray, wanted: np.ndarray) -> list[float]:
    """Solve least squares, dropping columns whose weight would be negative."""
    used = list(range(columns.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(columns[:, used], wanted, rcond=None)
        worst = int(np.argmin(found))
        if found[worst] >= 0:
            break
        del used[worst]
    weights = [0.0] * columns.shape[1]
    for column, weight in zip(used, found, strict=True):
        weights[column] = float(weight)
    return weights
