"""Class ids and depth codes to PNG bytes and back; bit-exact both ways."""

from typing import cast

import cv2
import numpy as np

from pipeline.records import UInt8Array, UInt16Array

# Level 1 with the default filters is the knee for label maps: see benchmarks when they land.
_PNG_PARAMETERS = (cv2.IMWRITE_PNG_COMPRESSION, 1)


def encode_png(array: UInt8Array | UInt16Array) -> bytes:
    """One PNG.

    Args:
        array: uint8 ``(H, W)``, uint8 ``(H, W, 3)`` RGB, or uint16 ``(H, W)``.

    Returns:
        The file's bytes.

    Raises:
        ValueError: If PNG cannot hold such an array.
    """
    if array.dtype not in {np.dtype(np.uint8), np.dtype(np.uint16)} or array.size == 0:
        message = f"PNG holds non-empty uint8 or uint16, got {array.dtype} {array.shape}"
        raise ValueError(message)
    ordered = array[..., ::-1] if array.ndim == 3 else array
    ok, data = cv2.imencode(".png", np.ascontiguousarray(ordered), _PNG_PARAMETERS)
    if not ok:
        message = f"PNG encoding failed for {array.dtype} {array.shape}"
        raise ValueError(message)
    return data.tobytes()


def decode_class_ids(data: bytes) -> UInt8Array:
    """Train ids uint8 ``(H, W)`` from the bytes of a ``class_ids`` or ``_labelTrainIds.png``."""
    return cast("UInt8Array", _decode(data, np.uint8))


def decode_depth(data: bytes) -> UInt16Array:
    """Depth codes uint16 ``(H, W)``, 0 invalid, from the bytes of a ``depth`` value."""
    return cast("UInt16Array", _decode(data, np.uint16))


def _decode(data: bytes, dtype: type[np.generic]) -> object:
    array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if array is None or array.ndim != 2 or array.dtype != dtype:
        message = f"not a single-channel {np.dtype(dtype)} PNG"
        raise ValueError(message)
    return array
