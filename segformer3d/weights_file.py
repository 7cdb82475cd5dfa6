"""Our weights files, as far as one can tell without torch, which takes seconds to import.

A weights file is safetensors with one metadata entry, `segformer3d`: the JSON of `WeightsInfo`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import SEEK_END, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, deserialize

from segformer3d.config import WeightsInfo
from segformer3d.tensor_shapes import tensor_shapes

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

METADATA_KEY = "segformer3d"
NAMES_SHOWN = 3
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32")
# The bits of a float's exponent.
_EXPONENTS = {
    "F64": 0x7FF0000000000000,
    "F32": 0x7F800000,
    "F16": 0x7C00,
    "BF16": 0x7F80,
}
HEADER_BYTES_MAX = 100_000_000  # the format's own limit

Shapes = Mapping[str, tuple[int, ...]]


class WeightsError(ValueError):
    """Weights that cannot be used; the message is one line and says how to mend it."""


def read_info(source: bytes | str | PathLike[str]) -> WeightsInfo:
    """Read what a weights file says about itself, without its tensors.

    Raises:
        WeightsError: It is no weights file of this project.
        OSError: The file cannot be read.
    """
    with BytesIO(source) if isinstance(source, bytes) else local_path(source).open("rb") as file:
        header = _read_header(file)
        start = file.tell()
        num_bytes = file.seek(0, SEEK_END) - start
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise WeightsError("damaged, its metadata is no JSON object: fetch it again")
    entry = metadata.get(METADATA_KEY)
    if entry is None:
        raise WeightsError(
            "a safetensors file of another project: convert its folder with `weights import`"
        )
    _check_tensors(header, num_bytes)
    try:
        return WeightsInfo.from_dict(json.loads(entry))
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        said = str(error) if isinstance(error, ValueError) else "a part is missing or no such value"
        raise WeightsError(f"its description cannot be read by this version: {said}") from error


def check_weights(data: bytes) -> WeightsInfo:
    """Check that a file's tensors are numbers, and those of its network unless it is timm's.

    Raises:
        WeightsError: It is no weights file of this project, or the tensors do not fit.
    """
    info = read_info(data)
    try:
        tensors: list[tuple[str, dict[str, Any]]] = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise WeightsError(f"damaged ({error}): fetch it again") from error
    broken = [name for name, tensor in tensors if not _is_finite(tensor["dtype"], tensor["data"])]
    if broken:
        raise WeightsError(f"values that are no finite numbers in {first_names(broken)}")
    if not info.config.timm_name:
        found = {name: tuple(tensor["shape"]) for name, tensor in tensors}
        check_fit(found, tensor_shapes(info.config))
    return info


def _is_finite(dtype: str, data: bytes) -> bool:
    """Whether none of a tensor's numbers has the exponent of infinity and of what is no number."""
    if dtype not in _EXPONENTS:
        return True
    bits = np.frombuffer(data, f"<u{_EXPONENTS[dtype].bit_length() // 8 + 1}")
    exponent = bits.dtype.type(_EXPONENTS[dtype])
    return not bool(((bits & exponent) == exponent).any())


def check_fit(found: Shapes, expected: Shapes) -> None:
    """Compare names and shapes of tensors with those of a network.

    Raises:
        WeightsError: They are not the same.
    """
    if unexpected := sorted(name for name in found if name not in expected):
        raise WeightsError(f"unexpected tensors: {first_names(unexpected)}")
    if missing := [name for name in expected if name not in found]:
        raise WeightsError(f"tensors are missing (named as here): {first_names(missing)}")
    if misshapen := [name for name in expected if found[name] != expected[name]]:
        raise WeightsError(f"tensors of another shape (named as here): {first_names(misshapen)}")


def bundled_path() -> Path:
    """Return where the weights file of the package lies: MiT-B0, for trying things out."""
    return Path(__file__).with_name("bundled") / "mit_b0.safetensors"


def bundled_weights() -> bytes:
    """Return the weights file of the package; `weights show` prints its card."""
    return bundled_path().read_bytes()


def first_names(names: Iterable[str]) -> str:
    """List the first few names on one line."""
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def local_path(source: str | PathLike[str]) -> Path:
    """Return a file's path, if a file can have it."""
    path = Path(source)
    if "\0" in str(path):
        raise WeightsError(f"not a file name: {str(path)!r}")
    return path


def _read_header(file: BinaryIO) -> dict[str, Any]:
    """Read the JSON header of a safetensors file: 8 bytes of length, then the JSON."""
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(min(length, HEADER_BYTES_MAX)))
    except (ValueError, RecursionError) as error:
        raise WeightsError("not a safetensors file: convert it with `weights import`") from error
    return header if isinstance(header, dict) else {}


def _check_tensors(header: dict[str, Any], num_bytes: int) -> None:
    """Whether the tensors that a header tells of can be there, and a network can be of them."""
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    try:
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        odd = sorted(name for name, entry in tensors.items() if entry["dtype"] not in DTYPES)
    except (TypeError, ValueError, LookupError, OverflowError) as error:
        raise WeightsError("damaged, its header is none: fetch it again") from error
    if end != num_bytes:
        message = f"damaged, it has {num_bytes} bytes of tensors instead of {end}: fetch it again"
        raise WeightsError(message)
    if odd:
        # Some of them torch cannot read.
        raise WeightsError(f"tensors of other types than {', '.join(DTYPES)}: {first_names(odd)}")
