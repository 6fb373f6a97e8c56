"""Files of tensors in the safetensors format, read and written without torch.

Eight bytes say how long the header is, the header is JSON and says where each tensor lies, and the
tensors follow in row-major, little-endian order, as they do on the wire.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from ndif_client.errors import TensorFileError
from ndif_client.wire.tensors import ITEM_BYTES

#: The format's dtype -> the wire's.
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
_NAMES = {wire: own for own, wire in _DTYPES.items()}

#: Bytes of a header, as the format's own library limits it.
_MAX_HEADER = 100_000_000

_METADATA = "__metadata__"

Size = Annotated[int, msgspec.Meta(ge=0)]


class Tensor(NamedTuple):
    """A tensor as the wire has it: the name of its dtype, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[Size]
    data_offsets: tuple[Size, Size]


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[dict[str, Tensor]]:
    """Give the tensors of a file, by name; their bytes are read where they are used.

    Raises:
        OSError: the file can't be opened.
        TensorFileError: it is no file of tensors, or has some of a dtype that can't be sent.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open(path, "rb"))
        if os.fstat(file.fileno()).st_size < 8:
            raise TensorFileError(f"{path} is no safetensors file: it has less than 8 bytes")
        mapped = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        view = stack.enter_context(memoryview(mapped))
        tensors = _tensors(view, path)
        for tensor in tensors.values():
            stack.callback(tensor.data.release)
        yield tensors


def _tensors(view: memoryview, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    length = int.from_bytes(view[:8], "little")
    if length > min(_MAX_HEADER, view.nbytes - 8):
        raise TensorFileError(
            f"{path} is no safetensors file: its header would have {length} bytes"
        )
    try:
        raw = msgspec.json.decode(bytes(view[8 : 8 + length]), type=dict[str, msgspec.Raw])
        raw.pop(_METADATA, None)
        entries = {name: msgspec.json.decode(one, type=_Entry) for name, one in raw.items()}
    except msgspec.DecodeError as error:  # ValidationError is one
        raise TensorFileError(f"{path} is no safetensors file: {error}") from None
    for name, entry in entries.items():
        start, end = entry.data_offsets
        if entry.dtype not in _DTYPES:
            raise TensorFileError(
                f"{name!r} in {path} has dtype {entry.dtype}, which can't be sent"
            )
        nbytes = math.prod(entry.shape) * ITEM_BYTES[_DTYPES[entry.dtype]]
        if end - start != nbytes or 8 + length + end > view.nbytes:
            raise TensorFileError(f"{path} is damaged: {name!r} is said to lie at {start} to {end}")
    data = 8 + length
    return {
        name: Tensor(
            _DTYPES[entry.dtype],
            tuple(entry.shape),
            view[data + entry.data_offsets[0] : data + entry.data_offsets[1]],
        )
        for name, entry in entries.items()
    }


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file, which appears when it is complete.

    Raises:
        OSError: it can't be written.
        TensorFileError: the format has no such dtype or name.
    """
    # Those of the widest elements first, so that each is aligned.
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    entries: dict[str, _Entry] = {}
    place = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES or name == _METADATA:
            raise TensorFileError(f"{name!r} ({tensor.dtype}) can't be put into a safetensors file")
        end = place + tensor.data.nbytes
        entries[name] = _Entry(_NAMES[tensor.dtype], list(tensor.shape), (place, end))
        place = end
    header = msgspec.json.encode(entries)
    header += b" " * (-len(header) % 8)
    _write_whole(
        Path(path), [len(header).to_bytes(8, "little"), header], [tensors[n] for n in order]
    )


def _write_whole(path: Path, head: Sequence[bytes], tensors: Sequence[Tensor]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in head:
                file.write(piece)
            for tensor in tensors:
                file.write(tensor.data)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
