"""The verbs ``weights import`` and ``weights show``."""

import hashlib
from pathlib import Path
from typing import Any

from pipeline.errors import UserError


def import_to_file(source: str, target: str) -> str:
    """Import foreign weights and save them in our format.

    Returns:
        One line that says what was written.

    Raises:
        UserError: If the source is none of the known formats, or the target cannot be written.
    """
    from segformer3d.weights import WeightsError, import_weights, save_weights

    try:
        model, info = import_weights(Path(source))
    except WeightsError as error:
        message = f"weights {error}"
        raise UserError(message) from None
    except FileNotFoundError:
        message = f"weights {source}: no such file or folder"
        raise UserError(message) from None
    except OSError as error:
        message = f"weights {source}: {error.strerror or error}"
        raise UserError(message) from None
    try:
        save_weights(Path(target), model, info)
    except (ValueError, OSError) as error:
        message = f"{target}: {getattr(error, 'strerror', None) or error}"
        raise UserError(message) from None
    return f"{target}: {info.config.variant}, sha256 {_sha256(target)}"


def describe(path: str) -> dict[str, Any]:
    """What a weights file says of itself, and its sha256.

    Raises:
        UserError: If it is not a weights file of this project.
    """
    from segformer3d.weights import WeightsError, read_info

    try:
        info = read_info(Path(path))
        return {"path": path, "sha256": _sha256(path), **info.to_dict()}
    except (WeightsError, OSError) as error:
        message = f"weights {path}: {getattr(error, 'strerror', None) or error}"
        raise UserError(message) from None


def _sha256(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
