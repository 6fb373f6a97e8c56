"""The KV cache: what is written to a page is read from it, and nothing beyond its end."""

from __future__ import annotations

import torch

from ndif_actor.engine.attention import Attended
from ndif_actor.engine.cache import PAGE_TOKENS, KVCache, make_cache

CPU = torch.device("cpu")
MODULES = [torch.nn.Identity(), torch.nn.Identity()]
ATTENDED = [Attended(MODULES[0], (2, 3), (2, 3)), Attended(MODULES[1], (1, 4), (1, 5))]


def cache(pages: int = 4) -> KVCache:
    made = KVCache(ATTENDED, pages, torch.float32, CPU)
    made.clear(range(pages))
    return made


def write(into: KVCache, pages: list[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    key, value = torch.randn(1, 2, tokens, 3), torch.randn(1, 2, tokens, 3)
    into.write(MODULES[0], key, value, torch.arange(tokens), into.slots(pages)[:tokens])
    return key, value


def test_keys_and_values_are_read_where_they_were_written() -> None:
    made = cache()
    key, value = write(made, [2, 0], 20)

    keys, values = made.read(MODULES[0], made.slots([2, 0])[None, :20])

    assert torch.equal(keys, key)
    assert torch.equal(values, value)


def test_each_module_has_memory_of_its_own_shape() -> None:
    made = cache()
    write(made, [0], 3)

    keys, values = made.read(MODULES[1], made.slots([0])[None, :3])

    assert (keys.shape, values.shape) == ((1, 1, 3, 4), (1, 1, 3, 5))
    assert not keys.any()


def test_beyond_the_end_of_a_short_table_lies_nothing_but_zeros() -> None:
    made = cache(3)
    write(made, [0, 1, 2], 3 * PAGE_TOKENS)

    table = made.table([[0, 1], [2]])
    keys, _ = made.read(MODULES[0], table)

    assert table.shape == (2, 2 * PAGE_TOKENS)
    assert keys[1, :, :PAGE_TOKENS].all()
    assert not keys[1, :, PAGE_TOKENS:].any()


def test_a_page_that_changes_hands_holds_no_trace_of_its_last_owner() -> None:
    made = cache()
    slots = made.slots([1])
    poison = torch.full((1, 2, PAGE_TOKENS, 3), float("nan"))
    made.write(MODULES[0], poison, poison, torch.arange(PAGE_TOKENS), slots)

    made.clear([1])

    assert not any(part.any() for part in made.read(MODULES[0], slots[None]))


def test_pages_come_back_from_the_host_wherever_there_is_room() -> None:
    made = cache()
    key, value = write(made, [0, 1], 20)
    copies = made.take_out([0, 1])
    made.clear([0, 1, 2, 3])

    made.put_back([3, 2], copies)

    keys, values = made.read(MODULES[0], made.slots([3, 2])[None, :20])
    assert torch.equal(keys, key)
    assert torch.equal(values, value)


def test_the_cache_takes_no_more_memory_than_it_is_given() -> None:
    token_bytes = 4 * (2 * 3 + 2 * 3 + 4 + 5)

    made = make_cache(ATTENDED, torch.float32, CPU, 10 * PAGE_TOKENS * token_bytes, 1)

    assert made is not None and made.num_pages == 9  # the tenth is the one of zeros
    assert make_cache(ATTENDED, torch.float32, CPU, token_bytes, 1) is None


def test_a_model_that_attends_twice_in_one_module_gets_no_cache() -> None:
    assert make_cache([ATTENDED[0], ATTENDED[0]], torch.float32, CPU, 1 << 20, 1) is None
