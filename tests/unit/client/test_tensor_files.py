"""Files of tensors: what the format's own library writes and reads, and what is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as reference

from ndif_client.errors import TensorFileError
from ndif_client.tensor_files import Tensor, reading, write
from ndif_client.wire.tensors import export_array

ARRAYS = {
    "odd": np.array([True, False, True]),
    "wide": np.arange(6, dtype=np.float64).reshape(2, 3),
    "narrow": np.arange(5, dtype=np.int8),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float16),
}


def test_the_formats_own_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {name: Tensor(*export_array(array)) for name, array in ARRAYS.items()}
    write(tmp_path / "made", tensors)
    write(tmp_path / "made", tensors)

    found = reference.load_file(tmp_path / "made")

    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_the_formats_own_library_writes_is_read(tmp_path: Path) -> None:
    reference.save_file(ARRAYS, tmp_path / "made", {"note": "x"})

    with reading(tmp_path / "made") as tensors:
        assert tensors.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            dtype, shape, data = tensors[name]
            assert (dtype, shape, bytes(data)) == (array.dtype.name, array.shape, array.tobytes())


def header(text: str, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + data


def entry(dtype: str, shape: str, data: bytes = b"") -> bytes:
    one = f'"dtype": "{dtype}", "shape": {shape}, "data_offsets": [0, 4]'
    return header(f'{{"a": {{{one}}}}}', data)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "less than 8 bytes"),
        (b"\xff" * 20, "header would have"),
        (header("[1]"), "no safetensors file"),
        (entry("F32", "[-1]"), "no safetensors file"),
        (entry("F4", "[1]"), "dtype F4"),
        (entry("F32", "[2]", b"1234"), "damaged"),
        (entry("F32", "[1]", b"123"), "damaged"),
    ],
)
def test_damaged_files_are_refused_in_words(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "made").write_bytes(content)

    with pytest.raises(TensorFileError, match=words), reading(tmp_path / "made"):
        pass


def test_what_the_format_can_not_hold_is_refused(tmp_path: Path) -> None:
    tensor = Tensor(*export_array(np.zeros(2, np.complex128)))
    with pytest.raises(TensorFileError, match="complex128"):
        write(tmp_path / "made", {"a": tensor})
    assert list(tmp_path.iterdir()) == []
