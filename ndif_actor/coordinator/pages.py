"""Whose the pages of the KV cache are, and which of them hold the beginning of a known prompt.

    free -> take -> owned -> release -> free
                      |                  ^
                  register -> (owned, shared, unreferenced) -> evicted when others need the page

A page is found again by a digest of everything up to its end, so equal tokens after different
ones are different pages. Only numbers live here: the memory is the shards'.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class Chain:
    """The digests of the full pages of one sequence, each made once as the sequence grows.

    Args:
        salt: sequences of different salts never have a digest in common.
        page_tokens: tokens of a page.
    """

    def __init__(self, salt: int, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._start = hashlib.blake2b(str(salt).encode()).digest()
        self._digests: list[bytes] = []

    def digest(self, ids: Sequence[int], index: int) -> bytes:
        """Return the digest of page `index` of `ids`, which may only have grown since last time."""
        for page in range(len(self._digests), index + 1):
            start = page * self._page_tokens
            own = array("q", ids[start : start + self._page_tokens])
            assert len(own) == self._page_tokens, "only full pages have a digest"
            previous = self._digests[-1] if self._digests else self._start
            self._digests.append(hashlib.blake2b(previous + own.tobytes()).digest())
        return self._digests[index]


class PagePool:
    """The pages `0 .. num_pages - 1` of `page_tokens` tokens each.

    A page nobody refers to is free, also while it is registered: then it is handed out last, the
    longest unused one first.
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._references = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        #: registered pages that nobody refers to, the longest unused first
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """How many pages `take` can hand out."""
        return len(self._blank) + len(self._idle)

    def pages_of(self, tokens: int) -> int:
        """Return how many pages hold that many tokens."""
        return -(-tokens // self.page_tokens)

    def take(self, count: int) -> list[int]:
        """Hand out pages; what they hold is not defined.

        Raises:
            ValueError: fewer are free.
        """
        if count > self.free:
            raise ValueError(f"{count} pages are wanted and {self.free} are free")
        pages = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._page_of[self._digest_of.pop(page)]
            self._references[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Give back what `take` or `match` has returned, each page once."""
        # A page is of no use without those before it, so the later ones shall be evicted first.
        for page in reversed(list(pages)):
            assert self._references[page] > 0, f"page {page} is released more often than taken"
            self._references[page] -= 1
            if self._references[page]:
                continue
            if page in self._digest_of:
                self._idle[page] = None
            else:
                self._blank.append(page)

    def match(self, chain: Chain, ids: Sequence[int]) -> list[int]:
        """Return the longest run of registered pages that `ids` begins with, and refer to each.

        The last of `ids` is never in them: it has to be fed for a token to be made.
        """
        found: list[int] = []
        for index in range((len(ids) - 1) // self.page_tokens):
            page = self._page_of.get(chain.digest(ids, index))
            if page is None:
                break
            found.append(page)
        for page in found:
            self._references[page] += 1
            self._idle.pop(page, None)
        return found

    def register(self, chain: Chain, ids: Sequence[int], index: int, page: int) -> None:
        """Let others find `page`, which holds page `index` of `ids` and is not written any more."""
        assert self._references[page] > 0, "only its owner knows what a page holds"
        digest = chain.digest(ids, index)
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest
