"""How a tensor is described on the wire, and how its raw bytes become an array again.

The bytes themselves travel as a frame buffer in row-major, little-endian order. torch is never
imported here unless a caller asks for torch tensors; numpy is enough for everything else.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from ndif_client.wire.frames import Buffer

#: wire name -> bytes per element
ITEM_BYTES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}

MAX_DIMENSIONS = 32

DtypeName = Literal[
    "bool", "uint8", "int8", "int16", "int32", "int64",
    "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
]  # fmt: skip

ArrayKind = Literal["auto", "torch", "numpy"]


class TensorSpec(msgspec.Struct, frozen=True):
    """One tensor: what it is, and which buffer of the frame holds its bytes.

    `buffer` is -1 where only the description travels (a model tree, an error message).
    """

    dtype: DtypeName
    shape: Annotated[
        tuple[Annotated[int, msgspec.Meta(ge=0)], ...], msgspec.Meta(max_length=MAX_DIMENSIONS)
    ]
    buffer: Annotated[int, msgspec.Meta(ge=-1)] = -1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def check_buffer(spec: TensorSpec, buffers: list[memoryview]) -> memoryview:
    """Return the buffer `spec` points to, after checking that it exists and has the right length.

    Raises:
        ValueError: no such buffer, or its length is not what dtype and shape say.
    """
    if not 0 <= spec.buffer < len(buffers):
        raise ValueError(f"tensor refers to buffer {spec.buffer} of {len(buffers)}")
    buffer = buffers[spec.buffer]
    if buffer.nbytes != spec.nbytes:
        raise ValueError(
            f"a {spec.dtype} tensor of shape {list(spec.shape)} has {spec.nbytes} bytes, "
            f"its buffer has {buffer.nbytes}"
        )
    return buffer


def is_array(value: Any) -> bool:
    """Whether `value` is a numpy array or scalar, or a torch tensor, without importing torch."""
    if isinstance(value, (np.ndarray, np.generic)):
        return True
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def export_array(value: Any) -> tuple[str, tuple[int, ...], memoryview]:
    """Return dtype name, shape and raw bytes of a numpy array or torch tensor.

    The bytes are shared with `value` where it is contiguous and on the CPU.

    Raises:
        TypeError: `value` is no array, or its dtype has no name on the wire.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        if name not in ITEM_BYTES:
            raise TypeError(f"tensors of dtype {value.dtype} can't be sent")
        flat = value.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy()
        return name, tuple(value.shape), memoryview(raw).cast("B")
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.ascontiguousarray(value)
        name = array.dtype.name
        if name not in ITEM_BYTES:
            raise TypeError(f"arrays of dtype {array.dtype} can't be sent")
        little = array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1)
        return name, np.shape(value), little.view(np.uint8).data.cast("B")
    raise TypeError(f"{type(value).__name__} is neither a numpy array nor a torch tensor")


def import_array(spec: TensorSpec, buffer: Buffer, kind: ArrayKind = "auto") -> Any:
    """Wrap raw bytes as a tensor that shares their memory.

    Args:
        spec: dtype and shape.
        buffer: exactly `spec.nbytes` bytes; writable if the result is to be.
        kind: "torch", "numpy", or "auto": torch where it is installed.

    Returns:
        A `torch.Tensor` on the CPU, or a numpy array. numpy has no bfloat16: such values come
        back as float32, which holds each of them exactly.
    """
    if kind == "torch" or (kind == "auto" and importlib.util.find_spec("torch") is not None):
        return _import_torch(spec, buffer)
    if spec.dtype == "bfloat16":
        widened = np.frombuffer(buffer, dtype="<u2").astype("<u4") << np.uint32(16)
        return widened.view(np.float32).reshape(spec.shape)
    return np.frombuffer(buffer, dtype=np.dtype(spec.dtype)).reshape(spec.shape)


def _import_torch(spec: TensorSpec, buffer: Buffer) -> Any:
    import torch

    dtype = getattr(torch, spec.dtype)
    if math.prod(spec.shape) == 0:
        return torch.empty(spec.shape, dtype=dtype)
    view = memoryview(buffer)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=dtype).reshape(
        spec.shape
    )
