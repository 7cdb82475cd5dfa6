"""The verbs ``weights import`` and ``weights show``."""

import hashlib
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.urls import check_local

if TYPE_CHECKING:
    from segformer3d.config import WeightsInfo
    from segformer3d.model import Segformer3D


def import_to_file(source: str, target: str, *, half: bool = False) -> str:
    """Import foreign weights and save them in our format.

    Args:
        source: Where they are.
        target: The file to write.
        half: Whether to store them as float16.

    Returns:
        One line that says what was written.

    Raises:
        UserError: If the source is none of the known formats, or the target cannot be written.
    """
    model, info = read_foreign(source)
    write_weights(target, model, info, half=half)
    return f"{target}: {info.config.variant}, sha256 {file_sha256(target)}"


def read_foreign(
    source: str | PathLike[str], *, shown: str | None = None
) -> "tuple[Segformer3D, WeightsInfo]":
    """Read weights of another project.

    Args:
        source: The origin's .pt, an NVlabs .pth or a Hugging Face folder.
        shown: What an error calls it.

    Raises:
        UserError: If it is none of them.
    """
    from segformer3d.weights import import_weights
    from segformer3d.weights_file import WeightsError

    check_local(str(source), "weights")
    try:
        return import_weights(Path(source))
    except WeightsError as error:
        reason = str(error).removeprefix(f"{source}: ") if shown else str(error)
        message = f"weights {shown}: {reason}" if shown else f"weights {reason}"
        raise UserError(message) from None
    except FileNotFoundError:
        message = f"weights {shown or source}: no such file or folder"
        raise UserError(message) from None
    except OSError as error:
        message = f"weights {shown or source}: {error.strerror or error}"
        raise UserError(message) from None


def write_weights(
    target: str, model: "Segformer3D", info: "WeightsInfo", *, half: bool = False
) -> None:
    """Write a weights file.

    Raises:
        UserError: If it cannot be written.
    """
    from segformer3d.weights import save_weights

    check_local(target, "weights")
    try:
        save_weights(Path(target), model, info, half=half)
    except (ValueError, OSError) as error:
        message = f"{target}: {getattr(error, 'strerror', None) or error}"
        raise UserError(message) from None


def describe(path: str | None) -> dict[str, Any]:
    """What a weights file says of itself, in words too, and its sha256.

    Args:
        path: The file; None is the one in the package.

    Raises:
        UserError: If it is not a weights file of this project.
    """
    from segformer3d.weights_file import WeightsError, bundled_path, read_info

    if path is not None:
        check_local(path, "weights")
    file = bundled_path() if path is None else Path(path)
    try:
        info = read_info(file)
        digest = file_sha256(file)
    except (WeightsError, OSError) as error:
        message = f"weights {path or file}: {getattr(error, 'strerror', None) or error}"
        raise UserError(message) from None
    return {"path": str(path or file), "sha256": digest, "heads": heads_in_words(info)} | (
        info.to_dict()
    )


def heads_in_words(info: "WeightsInfo") -> str:
    """What the heads give a job's rows, and what they leave out."""
    config, codec = info.config, info.depth_codec
    if config.num_classes is None:
        classes = "no segmentation head: a job's class_ids are null"
    else:
        classes = f"segmentation of {config.num_classes} classes"
    if codec is None:
        return f"{classes}; no depth head: a job's depth is null"
    if codec.kind == "metric":
        return f"{classes}; depth in metres"
    return f"{classes}; relative depth, without a unit: {codec.meaning}"


def file_sha256(path: str | PathLike[str]) -> str:
    """Sha256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
