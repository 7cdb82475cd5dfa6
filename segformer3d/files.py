"""Files that appear under their name whole or not at all."""

from __future__ import annotations

import os
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def replaced_whole(path: Path) -> Iterator[BinaryIO]:
    """Write a file beside `path`; once it is whole and on the disk it takes that name."""
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A new, empty, hidden file in the folder of `path`, to be written and to take its name.

    Nobody can know its name before, so that no link may wait there for what we write.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.part")
    flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC
    os.close(os.open(temporary, flags, 0o666))
    return temporary
