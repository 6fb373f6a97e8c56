"""The KV cache of one shard: pages of slots, one slot a token, the same in every layer.

Which page is whose is decided by the coordinator; here lies only the memory. One more page than it
knows of stays zero for ever: what is read beyond the end of a sequence is read there.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from ndif_actor.engine.attention import Attended

#: Tokens a page holds: small ones waste little, and are found again sooner.
PAGE_TOKENS = 16

#: Part of the free memory that the cache takes when nobody says how much.
_SHARE = {"cpu": 0.25, "cuda": 0.8}

#: Slot numbers stay far within 32 bits.
_MOST_PAGES = 1 << 24


class KVCache:
    """Keys and values of generations, for every module that attends.

    Args:
        attended: the modules, and what a token takes in each.
        num_pages: pages that can be handed out.
        dtype, device: of the model.
    """

    def __init__(
        self,
        attended: Sequence[Attended],
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        slots = (num_pages + 1) * PAGE_TOKENS
        # Memory that nobody has touched yet costs nothing on a CPU.
        self._layers = {
            id(one.module): tuple(
                torch.empty(slots, *shape, dtype=dtype, device=device)
                for shape in (one.key_shape, one.value_shape)
            )
            for one in attended
        }
        self._device = device
        self.clear([num_pages])

    # ------------------------------------------------------------ during a forward

    def write(
        self,
        module: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Keep the keys and values `[1, heads, T, dim]` of some rows."""
        for memory, new in zip(self._layers[id(module)], (key, value), strict=True):
            memory.index_copy_(0, slots, new[0].transpose(0, 1).index_select(0, rows))

    def read(
        self, module: torch.nn.Module, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values `[sequences, heads, longest, dim]`, of as many slots."""
        keys, values = (
            memory.index_select(0, slots.reshape(-1)).unflatten(0, slots.shape).transpose(1, 2)
            for memory in self._layers[id(module)]
        )
        return keys, values

    # ------------------------------------------------------------ between forwards

    def clear(self, pages: Sequence[int]) -> None:
        """Zero pages that change hands: beyond a sequence's end there must be no NaN or inf."""
        if not pages:
            return
        slots = self.slots(pages)
        for memories in self._layers.values():
            for memory in memories:
                memory.index_fill_(0, slots, 0)

    def take_out(self, pages: Sequence[int]) -> list[torch.Tensor]:
        """Copy pages to the host's memory, to be given to `put_back`."""
        slots = self.slots(pages)
        return [
            memory.index_select(0, slots).cpu()
            for memories in self._layers.values()
            for memory in memories
        ]

    def put_back(self, pages: Sequence[int], copies: Sequence[torch.Tensor]) -> None:
        """Fill pages with what `take_out` has copied from as many."""
        slots = self.slots(pages)
        memories = (memory for memories in self._layers.values() for memory in memories)
        for memory, copy in zip(memories, copies, strict=True):
            memory.index_copy_(0, slots, copy.to(self._device))

    def slots(self, pages: Sequence[int]) -> torch.Tensor:
        """Return the slots of some pages, in order."""
        firsts = torch.tensor(pages, dtype=torch.int64) * PAGE_TOKENS
        return (firsts[:, None] + torch.arange(PAGE_TOKENS)).reshape(-1).to(self._device)

    def table(self, pages: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return `[sequences, longest]` slots; short sequences are filled up with zeros' place."""
        longest = max(map(len, pages))
        full = [page for own in pages for page in (*own, *[self.num_pages] * (longest - len(own)))]
        return self.slots(full).view(len(pages), -1)


def make_cache(
    attended: Sequence[Attended],
    dtype: torch.dtype,
    device: torch.device,
    nbytes: int | None,
    shards_here: int,
) -> KVCache | None:
    """Return a cache of as many pages as this rank can have, or None if that is none.

    Args:
        attended: every module that attends in a forward, and what a token takes in it.
        dtype, device: of the model.
        nbytes: memory for the cache; None for a share of what is free now.
        shards_here: ranks that share the memory of this machine, on CPUs.
    """
    if len({id(one.module) for one in attended}) < len(attended):
        return None  # a module that attends twice would overwrite its own keys
    if not all(getattr(one.module, "is_causal", True) for one in attended):
        return None  # an earlier token would have to see the later ones as they come
    numbers = sum(h * d for one in attended for h, d in (one.key_shape, one.value_shape))
    page_bytes = numbers * dtype.itemsize * PAGE_TOKENS
    if nbytes is None:
        nbytes = int(_free_bytes(device, shards_here) * _SHARE[device.type])
    num_pages = min(nbytes // page_bytes - 1, _MOST_PAGES) if page_bytes else 0
    return KVCache(attended, num_pages, dtype, device) if num_pages > 0 else None


def _free_bytes(device: torch.device, shards_here: int) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available) // shards_here
