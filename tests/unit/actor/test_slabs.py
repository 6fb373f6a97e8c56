"""Blocks of shared memory are given out, read by another mapping, and used again."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndif_actor.actor.slabs import SLAB_BYTES, Block, HostIdentity, SlabMap, SlabPool


def test_a_block_written_by_the_sender_is_read_by_the_receiver_without_a_copy() -> None:
    pool, seen = SlabPool(), SlabMap(HostIdentity.of_this_process())
    memory, block = pool.allocate(100_000)

    view = seen.view(block)
    memory[:5] = b"hello"

    assert bytes(view[:5]) == b"hello"
    assert view.readonly
    pool.close()


def test_released_memory_is_used_again_instead_of_growing() -> None:
    pool = SlabPool()
    numbers = set()
    for _ in range(50):
        _, block = pool.allocate(SLAB_BYTES // 2)
        numbers.add(block.slab)
        pool.release(block.slab, 1)

    assert len(numbers) <= 2
    pool.close()


def test_memory_that_was_not_released_is_never_given_out_again() -> None:
    pool = SlabPool()
    first, _ = pool.allocate(SLAB_BYTES)
    first[:4] = b"mine"
    for _ in range(5):
        other, block = pool.allocate(SLAB_BYTES)
        other[:4] = b"them"
        pool.release(block.slab, 1)

    assert bytes(first[:4]) == b"mine"
    pool.close()


@given(st.lists(st.integers(1, 3 * SLAB_BYTES), min_size=1, max_size=12))
def test_blocks_in_use_never_overlap(sizes: list[int]) -> None:
    pool = SlabPool()
    taken: dict[int, list[tuple[int, int]]] = {}
    for size in sizes:
        memory, block = pool.allocate(size)
        assert memory.nbytes == size
        for start, stop in taken.get(block.slab, []):
            assert block.start >= stop or block.start + size <= start
        taken.setdefault(block.slab, []).append((block.start, block.start + size))
    pool.close()


def test_a_block_outside_of_its_slab_is_refused() -> None:
    pool, seen = SlabPool(), SlabMap(HostIdentity.of_this_process())
    _, block = pool.allocate(1000)

    with pytest.raises(ValueError, match="of a slab of"):
        seen.view(Block(block.slab, block.descriptor, SLAB_BYTES - 10, 11))
    pool.close()


def test_slabs_beyond_what_is_kept_are_given_up_and_the_receiver_is_told() -> None:
    pool = SlabPool()
    before = len(os.listdir("/proc/self/fd"))
    blocks = [pool.allocate(64 << 20)[1] for _ in range(12)]
    for block in blocks:
        pool.release(block.slab, 1)

    assert pool.take_dropped()
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before
