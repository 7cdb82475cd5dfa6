"""Looks for secrets in everything that a run leaves: output, files, objects, tables."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.errors import StorageError
from pipeline.storage import Store

_PARQUET = b"PAR1"


def leaks(places: Iterator[tuple[str, bytes]], secrets: Sequence[str]) -> list[str]:
    """Where which secret stands, in bytes as they are or in a table's values and metadata."""
    found = []
    for name, data in places:
        texts = [name.encode(errors="surrogateescape"), data]
        if data.startswith(_PARQUET):
            file = pq.ParquetFile(io.BytesIO(data))
            texts += [repr(file.schema_arrow.metadata).encode(), repr(file.metadata).encode()]
            texts += [repr(row).encode() for row in file.read().to_pylist()]
        found += [f"{name}: {s}" for s in secrets if any(s.encode() in text for text in texts)]
    return found


def files_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every regular file, by its path."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            try:
                yield str(path), path.read_bytes()
            except FileNotFoundError:
                continue  # a daemon took it away


def objects_in(store: Store) -> Iterator[tuple[str, bytes]]:
    """Every object, by its key."""
    for key, data in store.read_many(sorted(item.key for item in store.list())):
        assert not isinstance(data, StorageError)
        yield f"{store.url}/{key}", data
