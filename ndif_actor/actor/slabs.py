"""Large buffers between processes of one host: written once, read where they lie.

The sender keeps anonymous memory files (memfds), which have no name and vanish with their last
process, and hands out blocks of them. The receiver opens a file through the sender's /proc entry,
maps it once, and says when it has done with a block.
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import msgspec

#: Bytes of a slab, unless one block alone needs more.
SLAB_BYTES = 16 << 20

#: Blocks start at multiples of this, so that any dtype may lie there.
ALIGNMENT = 64

#: Bytes of unused slabs that are kept for reuse.
KEEP_BYTES = 512 << 20


class HostIdentity(msgspec.Struct, frozen=True):
    """Whether two processes can reach each other's memory files, and through which pid."""

    boot: str
    pid_namespace: str
    uid: int
    pid: int

    @classmethod
    def of_this_process(cls) -> HostIdentity:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(boot, os.readlink("/proc/self/ns/pid"), os.getuid(), os.getpid())

    def shares_memory_with(self, other: HostIdentity) -> bool:
        """Whether the other process runs on this host, in this namespace, as this user."""
        mine = (self.boot, self.pid_namespace, self.uid)
        return mine == (other.boot, other.pid_namespace, other.uid)


class Block(msgspec.Struct, frozen=True):
    """Where a buffer lies: a slab by number and file descriptor of the sender, and a range."""

    slab: int
    descriptor: int
    start: int
    nbytes: int


class _Slab:
    def __init__(self, number: int, nbytes: int) -> None:
        self.number = number
        self.nbytes = nbytes
        self.descriptor = os.memfd_create(f"ndif-slab-{number}", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, nbytes)
        self.memory = memoryview(mmap.mmap(self.descriptor, nbytes))
        self.used = 0
        self.outstanding = 0

    def take(self, nbytes: int) -> tuple[memoryview, Block]:
        start = self.used
        self.used = start + -(-nbytes // ALIGNMENT) * ALIGNMENT
        self.outstanding += 1
        return self.memory[start : start + nbytes], Block(
            self.number, self.descriptor, start, nbytes
        )


class SlabPool:
    """The sender's side: gives out blocks and takes them back, to and from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slabs: dict[int, _Slab] = {}
        self._current: _Slab | None = None
        self._free: list[_Slab] = []
        self._next = 0
        self._dropped: list[int] = []

    def allocate(self, nbytes: int) -> tuple[memoryview, Block]:
        """Return writable memory of `nbytes` bytes and where it lies."""
        with self._lock:
            current = self._current
            if current is None or current.used + nbytes > current.nbytes:
                current = self._current = self._slab_for(nbytes)
            return current.take(nbytes)

    def release(self, number: int, blocks: int) -> None:
        """Take back blocks of a slab; it is used again once all of them are back."""
        with self._lock:
            slab = self._slabs.get(number)
            if slab is None:
                return
            slab.outstanding -= blocks
            if slab.outstanding == 0:
                slab.used = 0
                if slab is not self._current:
                    self._keep_or_drop(slab)

    def take_dropped(self) -> list[int]:
        """Return the slabs given up since the last call, for the receiver to unmap."""
        with self._lock:
            dropped, self._dropped = self._dropped, []
            return dropped

    def close(self) -> None:
        """Give all memory up; what the receiver has mapped stays valid for it."""
        with self._lock:
            for slab in self._slabs.values():
                os.close(slab.descriptor)
            self._slabs.clear()
            self._free.clear()
            self._current = None

    def _slab_for(self, nbytes: int) -> _Slab:
        retired = self._current
        if retired is not None and retired.outstanding == 0:
            self._keep_or_drop(retired)
        fitting = [slab for slab in self._free if slab.nbytes >= nbytes]
        if fitting:
            smallest = min(fitting, key=lambda slab: slab.nbytes)
            self._free.remove(smallest)
            return smallest
        size = max(SLAB_BYTES, 1 << (nbytes - 1).bit_length())
        slab = _Slab(self._next, size)
        self._slabs[slab.number] = slab
        self._next += 1
        return slab

    def _keep_or_drop(self, slab: _Slab) -> None:
        if sum(free.nbytes for free in self._free) + slab.nbytes <= KEEP_BYTES:
            self._free.append(slab)
            return
        del self._slabs[slab.number]
        self._dropped.append(slab.number)
        os.close(slab.descriptor)


class SlabMap:
    """The receiver's side: the peer's slabs, each mapped at its first use."""

    def __init__(self, peer: HostIdentity) -> None:
        self._peer = peer
        self._mapped: dict[int, memoryview] = {}

    def view(self, block: Block) -> memoryview:
        """Return a block's memory, read-only.

        Raises:
            OSError: the peer's file can't be opened.
            ValueError: the block lies outside of its slab.
        """
        memory = self._mapped.get(block.slab)
        if memory is None:
            descriptor = os.open(f"/proc/{self._peer.pid}/fd/{block.descriptor}", os.O_RDONLY)
            try:
                memory = memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
            finally:
                os.close(descriptor)
            self._mapped[block.slab] = memory
        stop = block.start + block.nbytes
        if not 0 <= block.start <= stop <= memory.nbytes:
            raise ValueError(f"block {block.start}:{stop} of a slab of {memory.nbytes} bytes")
        return memory[block.start : stop]

    def drop(self, slab: int) -> None:
        """Forget a slab that the peer has given up."""
        self._mapped.pop(slab, None)
