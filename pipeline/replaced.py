"""Parts of a library that are replaced by name for a while, where it has no setting for it."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, ours: Any) -> Iterator[None]:
    """Put ours in the place of a part, and theirs back at the end.

    Args:
        owner: The module or class that has it.
        name: What it is called there.
        ours: What stands there meanwhile.

    Raises:
        KeyError: If the owner itself has no such part.
    """
    # Not as an instance would see it: a static method stays one.
    theirs = vars(owner)[name]
    setattr(owner, name, ours)
    try:
        yield
    finally:
        setattr(owner, name, theirs)
