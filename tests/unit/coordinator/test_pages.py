"""Pages: never two owners, never lost, and what is found holds exactly what was asked for."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ndif_actor.coordinator.pages import Chain, PagePool


def registered(pool: PagePool, salt: int, ids: list[int]) -> list[int]:
    """Take the full pages of `ids` and let others find them."""
    pages = pool.take(len(ids) // pool.page_tokens)
    chain = Chain(salt, pool.page_tokens)
    for index, page in enumerate(pages):
        pool.register(chain, ids, index, page)
    return pages


def test_a_known_beginning_is_found_but_never_the_last_token() -> None:
    pool = PagePool(8, 2)
    pages = registered(pool, 0, [1, 2, 3, 4])

    assert pool.match(Chain(0, 2), [1, 2, 3, 4]) == pages[:1]
    assert pool.match(Chain(0, 2), [1, 2, 3, 4, 5]) == pages
    assert pool.match(Chain(0, 2), [1, 2, 9, 9, 9]) == pages[:1]
    assert pool.match(Chain(0, 2), [9, 2, 3, 4, 5]) == []


def test_another_salt_finds_nothing() -> None:
    pool = PagePool(8, 2)
    registered(pool, 0, [1, 2, 3, 4])

    assert pool.match(Chain(1, 2), [1, 2, 3, 4, 5]) == []


def test_released_pages_are_found_until_others_need_them_the_longest_unused_first() -> None:
    pool = PagePool(4, 1)
    old = registered(pool, 0, [1])
    new = registered(pool, 0, [2])
    pool.release(old)
    pool.release(new)
    assert pool.free == 4

    pool.take(3)

    assert pool.match(Chain(0, 1), [1, 0]) == []
    assert pool.match(Chain(0, 1), [2, 0]) == new


def test_the_end_of_a_prompt_is_evicted_before_its_beginning() -> None:
    pool = PagePool(3, 1)
    pages = registered(pool, 0, [1, 2, 3])
    pool.release(pages)
    pool.take(1)

    assert pool.match(Chain(0, 1), [1, 2, 3, 4]) == pages[:2]


def test_more_than_is_free_is_never_handed_out() -> None:
    pool = PagePool(2, 1)
    pool.take(1)

    with pytest.raises(ValueError, match="2 pages are wanted and 1 are free"):
        pool.take(2)
    assert pool.free == 1


class PoolWalk(RuleBasedStateMachine):
    """Any order of taking, finding, registering and releasing keeps every promise."""

    NUM_PAGES, PAGE_TOKENS = 6, 2

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(self.NUM_PAGES, self.PAGE_TOKENS)
        #: of each holder: salt, ids, chain and pages
        self.holders: list[tuple[int, list[int], Chain, list[int]]] = []
        #: what lies in each page
        self.content: dict[int, tuple[int, list[int]]] = {}

    @rule(salt=st.integers(0, 1), ids=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def begin(self, salt: int, ids: list[int]) -> None:
        chain = Chain(salt, self.PAGE_TOKENS)
        before = self.pool.free
        found = self.pool.match(chain, ids)
        assert len(found) * self.PAGE_TOKENS < len(ids)
        assert before - len(found) <= self.pool.free <= before
        for index, page in enumerate(found):
            assert self.content[page] == (salt, ids[: (index + 1) * self.PAGE_TOKENS])
        missing = self.pool.pages_of(len(ids)) - len(found)
        if missing > self.pool.free:
            with pytest.raises(ValueError):
                self.pool.take(missing)
            self.pool.release(found)
            return
        new = self.pool.take(missing)
        assert not set(new) & self.owned()
        pages = [*found, *new]
        for index in range(len(found), len(pages)):
            self.content[pages[index]] = salt, ids[: (index + 1) * self.PAGE_TOKENS]
        self.holders.append((salt, ids, chain, pages))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        _, ids, chain, pages = data.draw(st.sampled_from(self.holders))
        for index in range(len(ids) // self.PAGE_TOKENS):
            self.pool.register(chain, ids, index, pages[index])

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        self.pool.release(holder[3])

    def owned(self) -> set[int]:
        return {page for *_, pages in self.holders for page in pages}

    @invariant()
    def the_counts_add_up(self) -> None:
        assert self.pool.free + len(self.owned()) == self.NUM_PAGES

    @invariant()
    def no_page_lies_twice_in_one_sequence(self) -> None:
        assert all(len(set(pages)) == len(pages) for *_, pages in self.holders)

    @invariant()
    def only_equal_beginnings_share_a_page(self) -> None:
        for salt, ids, _, pages in self.holders:
            for index, page in enumerate(pages):
                assert self.content[page] == (salt, ids[: (index + 1) * self.PAGE_TOKENS])


TestPoolWalk = PoolWalk.TestCase
TestPoolWalk.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
