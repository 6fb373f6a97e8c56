"""How much KV cache the replica that is ready has for generations."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ndif_actor.messages import Loaded


class CacheSize(msgspec.Struct, frozen=True):
    """The KV cache: `num_pages` pages of `page_tokens` tokens each.

    If there is none, `missing` says what generation would need.
    """

    num_pages: int = 0
    page_tokens: int = 1
    missing: str = "a replica that is ready"

    @property
    def tokens(self) -> int:
        """How many tokens it holds."""
        return self.num_pages * self.page_tokens


def cache_size(loaded: Sequence[Loaded], unpackable: str | None) -> CacheSize:
    """Return the cache that all shards have, as they have reported it.

    Args:
        loaded: the report of each rank.
        unpackable: why requests can't share a forward, if so.
    """
    if unpackable is not None:
        return CacheSize(
            missing=f"a model whose requests can share a forward; of this one's: {unpackable}"
        )
    num_pages = min(shard.cache_pages for shard in loaded)
    if not num_pages:
        return CacheSize(
            missing="a KV cache, which this model can't use (no encoder can) or has no memory for"
        )
    return CacheSize(num_pages, loaded[0].page_tokens, "")
