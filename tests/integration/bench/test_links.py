"""What the ask and tell benchmark measures really goes to another process and back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.links import PAGE_BYTES, Echo, Pair, read
from bench.micro.ask_tell import SIZES


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


@pytest.mark.parametrize("way", ["there", "back", "tell"])
@pytest.mark.parametrize("size", list(SIZES))
def test_arrays_of_every_size_go_every_way(pair: Pair, way: str, size: str) -> None:
    num_bytes, _ = SIZES[size]
    assert 0 < getattr(pair, way)(num_bytes, 2) < 60


def test_a_bare_echo_comes_back() -> None:
    echo = Echo()
    assert 0 < echo.there(1 << 10, 5) < 60
    assert 0 < echo.there(1 << 20, 2) < 60
    echo.close()


def test_one_byte_of_each_page_is_read() -> None:
    assert read(bytes([1] * PAGE_BYTES + [2] * PAGE_BYTES + [3])) == 6
