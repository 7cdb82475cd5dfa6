"""Statistics of one frame: what is said of it in a row, beside its class ids and depth.

They are computed where rows are made, not where the model runs: a GPU would wait for them, longer
than for itself.
"""

from typing import TYPE_CHECKING

import cv2
import numpy as np

from pipeline.records import Certainty, FrameStatistics, UInt8Array, UInt16Array
from segformer3d.config import DEPTH_INVALID, DepthCodec
from segformer3d.labels import NUM_CLASSES

if TYPE_CHECKING:
    from segformer3d.predictor import Predictions

_EXACT_IN_FLOAT32 = 2**24  # OpenCV counts in float32, ten times as fast as NumPy
_BINS = 256  # fewer than a byte has are four times as slow


def certainty_of(said: "Predictions", place: int) -> Certainty:
    """How sure the model is of one of the frames that it was asked about."""
    confidence, entropy = said.confidence_mean, said.entropy_mean
    return Certainty(
        confidence_mean=None if confidence is None else float(confidence[place]),
        entropy_mean=None if entropy is None else float(entropy[place]),
    )


def frame_statistics(
    certainty: Certainty,
    class_ids: UInt8Array | None,
    depth: UInt16Array | None,
    codec: DepthCodec | None,
) -> FrameStatistics:
    """Statistics of one frame.

    Args:
        certainty: What the model says of it.
        class_ids: uint8 ``(height, width)``, if there are any.
        depth: uint16 ``(h/4, w/4)`` codes, if there are any.
        codec: How depth codes read; only a metric codec gives metres.
    """
    percentiles: tuple[float | None, ...] = (None, None, None)
    if depth is not None and codec is not None and codec.kind == "metric":
        percentiles = depth_percentiles(depth, codec.scale)
    return FrameStatistics(
        class_fraction=None if class_ids is None else class_fraction(class_ids),
        confidence_mean=certainty.confidence_mean,
        entropy_mean=certainty.entropy_mean,
        depth_p05_m=percentiles[0],
        depth_p50_m=percentiles[1],
        depth_p95_m=percentiles[2],
    )


def class_fraction(class_ids: UInt8Array) -> tuple[float, ...]:
    """Share of each class among the valid pixels; all zero if there is none."""
    flat = np.ascontiguousarray(class_ids).reshape(-1)
    counts = np.zeros(_BINS)
    for start in range(0, flat.size, _EXACT_IN_FLOAT32):
        part = flat[start : start + _EXACT_IN_FLOAT32]
        counts += cv2.calcHist([part], [0], None, [_BINS], [0, _BINS]).reshape(-1)
    of_classes = counts[:NUM_CLASSES]
    return tuple((of_classes / max(1.0, of_classes.sum())).tolist())


def depth_percentiles(codes: UInt16Array, scale: float) -> tuple[float | None, ...]:
    """5th, 50th and 95th percentile of the valid metres; None where there is no valid pixel.

    Args:
        codes: uint16 codes of a metric codec, 0 where invalid.
        scale: Codes to a metre.
    """
    valid = codes[codes != DEPTH_INVALID]
    if valid.size == 0:
        return None, None, None
    return tuple((np.percentile(valid, (5, 50, 95)) / scale).tolist())
