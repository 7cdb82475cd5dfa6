"""Objects from JSON that somebody else may have written: every field of the type that it says."""

from collections.abc import Hashable
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from pydantic import TypeAdapter

# What a dataclass that is read with ``from_json`` has as ``__pydantic_config__``.
KNOWN_FIELDS_ONLY = {"extra": "forbid"}
T = TypeVar("T")


def from_json(cls: type[T], data: bytes) -> T:
    """A frozen dataclass from the bytes of a JSON object.

    Nothing is taken for something else: no number from a string, no field that is not known.

    Args:
        cls: The dataclass; its fields may be scalars, tuples, dictionaries and other dataclasses.
        data: Anything.

    Raises:
        ValueError: If the bytes are no such object; the message is one line.
    """
    from pydantic import ValidationError

    try:
        return cast("T", _adapter(cast("Hashable", cls)).validate_json(data, strict=True))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = f"{place}: {first['msg']}" if place else first["msg"]
        raise ValueError(" ".join(message.split())) from None


@cache
def _adapter(cls: Hashable) -> "TypeAdapter[Any]":
    # Not with the module: decoding children would pay for it at their start.
    from pydantic import TypeAdapter

    return TypeAdapter(cast("Any", cls))
