"""Memory that a decoding child writes and its parent reads, used again for shard after shard.

New pages cost more than the pixels that go into them: the kernel clears each one and maps it into
both processes, a fault at a time. Here they stay mapped, in both.
"""

import mmap
import os
import weakref

import numpy as np
import numpy.typing as npt

_MAX_FREE = 1

Bytes = npt.NDArray[np.uint8]

# Grows when this process is forked: a copy of it still sees what was lent before.
_forks = 0


class PixelMemory:
    """An anonymous file, mapped as long as this object lives.

    Attributes:
        fd: Its descriptor.
        size_bytes: Its size.
        forks: Which forks happened before it was made.
    """

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = max(1, size_bytes)
        self.forks = _forks
        self.fd = os.memfd_create("decoded-pixels")
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, self.size_bytes)
        self._mapped = mmap.mmap(self.fd, self.size_bytes)

    def array(self) -> Bytes:
        """A new array of all its bytes; views of it keep it alive."""
        return np.frombuffer(self._mapped, np.uint8)


class PixelPool:
    """Memory of one parent, taken for a shard and back when nobody holds the shard's pixels."""

    def __init__(self) -> None:
        self._free: list[PixelMemory] = []

    def take(self, size_bytes: int) -> PixelMemory:
        """Memory of at least that size, with anything in it."""
        while self._free:
            memory = self._free.pop()
            if memory.size_bytes >= size_bytes and memory.forks == _forks:
                return memory
        return PixelMemory(size_bytes)

    def lend(self, memory: PixelMemory) -> Bytes:
        """Its bytes, until no view of them is left: then it may be taken again."""
        array = memory.array()
        finalizer = weakref.finalize(array, self.give_back, memory)
        finalizer.atexit = False
        return array

    def give_back(self, memory: PixelMemory) -> None:
        """Keep what nobody holds for the next shard."""
        if len(self._free) < _MAX_FREE:
            self._free.append(memory)


class SeenMemory:
    """The child's mapping of what its parent has sent: of the latest memory alone.

    What the parent has let go goes, and a decoder run wild does not reach the shards before.
    """

    def __init__(self) -> None:
        self._file: tuple[int, int] | None = None
        self._mapped: mmap.mmap | None = None

    def array(self, fd: int) -> Bytes:
        """All bytes of a file, writable; takes the descriptor over."""
        status = os.fstat(fd)
        # No other file has its numbers while it is mapped here.
        file = status.st_dev, status.st_ino
        try:
            if self._mapped is None or file != self._file:
                self._mapped, self._file = mmap.mmap(fd, 0), file
        finally:
            os.close(fd)
        return np.frombuffer(self._mapped, np.uint8)


def _count_fork() -> None:
    global _forks  # noqa: PLW0603 - of this process
    _forks += 1


# Before and after: another thread may take memory in between.
os.register_at_fork(before=_count_fork, after_in_parent=_count_fork, after_in_child=_count_fork)
