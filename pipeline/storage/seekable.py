"""A seekable file over ``Store.read_range``, so that PyAV reads an object without a download.

Blocks of 4 MiB, the last eight kept: a container's index may lie at the end, and its streams are
interleaved around the position that is being read. A window shows part of a file as a file.
"""

import io
from collections import OrderedDict
from typing import TYPE_CHECKING, BinaryIO

from pipeline.errors import StoreUnavailableError
from pipeline.storage.base import ObjectInfo, Store

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BLOCK_BYTES = 4 * 1024**2
_MAX_BLOCKS = 8
_BUFFER_BYTES = 64 * 1024


def open_blocks(store: Store, info: ObjectInfo) -> BinaryIO:
    """The object that ``info`` describes, as a file; its reads raise the store's errors."""
    return io.BufferedReader(_BlockReader(store, info), _BUFFER_BYTES)


def open_window(file: BinaryIO, start: int, size_bytes: int) -> BinaryIO:
    """Part of a file as a file of its own; closing it closes the whole."""
    return io.BufferedReader(_Window(file, start, size_bytes), _BUFFER_BYTES)


class _Seekable(io.RawIOBase):
    """What has a position and a size."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}
        position = base[whence] + offset
        if position < 0:
            raise ValueError(f"negative seek position {position}")
        self._position = position
        return position


class _Window(_Seekable):
    def __init__(self, file: BinaryIO, start: int, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self._file = file
        self._start = start

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        length = max(0, min(len(view), self._size_bytes - self._position))
        self._file.seek(self._start + self._position)
        data = self._file.read(length)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


class _BlockReader(_Seekable):
    def __init__(self, store: Store, info: ObjectInfo) -> None:
        super().__init__(info.size_bytes)
        self._store = store
        self._info = info
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view) and self._position < self._info.size_bytes:
            index, offset = divmod(self._position, _BLOCK_BYTES)
            part = memoryview(self._block(index))[offset : offset + len(view) - filled]
            view[filled : filled + len(part)] = part
            filled += len(part)
            self._position += len(part)
        return filled

    def _block(self, index: int) -> bytes:
        block = self._blocks.pop(index, None)
        if block is None:
            start = index * _BLOCK_BYTES
            length = min(_BLOCK_BYTES, self._info.size_bytes - start)
            block = self._store.read_range(self._info.key, start, length)
            if len(block) != length:
                message = f"{self._store.url}/{self._info.key}: changed while it was read"
                raise StoreUnavailableError(message)
        self._blocks[index] = block
        if len(self._blocks) > _MAX_BLOCKS:
            self._blocks.popitem(last=False)
        return block
