"""The verb ``attention``: where the model looks, per stage and head, over the frame."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from jobs.picturing import (
    FileReport,
    Model,
    NewPainter,
    Painted,
    Painter,
    PictureRequest,
    picture_all,
    typed_memory_errors,
)
from pipeline.errors import UserError
from pipeline.geometry import Geometry, input_size, resize
from pipeline.records import UInt8Array
from segformer3d.draw import attention_grid

if TYPE_CHECKING:
    from segformer3d.attention import AttentionProbe

Mode = Literal["query", "mean"]


def attend(
    request: PictureRequest,
    *,
    at_px: tuple[float, float] | None = None,
    mode: Mode = "query",
    block: int = -1,
) -> list[FileReport]:
    """Draw the attention maps of every image and video; see ``picture_all``.

    Args:
        request: What the user asks for.
        at_px: Column and row of the query in the upright frame; its centre by default.
        mode: Where the query looks, or where all tokens look on average.
        block: The block of each stage, from 1; from the end where negative.

    Raises:
        UserError: If there is no such block or point, besides what ``picture_all`` raises.
    """
    if at_px is not None and mode == "mean":
        raise UserError("--at names one query, and --mode mean is of all of them: drop one")

    def new_painters(model: Model, geometry: Geometry) -> NewPainter:
        from segformer3d.attention import AttentionProbe

        try:
            probe = AttentionProbe(model.network, block=block)
        except ValueError as error:
            raise UserError(str(error)) from None
        return partial(AttentionPainter, model, probe, geometry, at_px, mode)

    return picture_all(request, "attention" if mode == "query" else "attention_mean", new_painters)


class AttentionPainter(Painter):
    """A grid of one tile per stage and head."""

    def __init__(
        self,
        model: Model,
        probe: "AttentionProbe",
        geometry: Geometry,
        at_px: tuple[float, float] | None,
        mode: Mode,
    ) -> None:
        self._predictor = model.predictor
        self._probe = probe
        self._geometry = geometry
        self._at_px = at_px
        self._mode = mode

    def paint(self, frames: Sequence[UInt8Array]) -> list[Painted]:
        """As in ``Painter``."""
        return [self._paint(frame) for frame in frames]

    def picture_size(self, width: int, height: int) -> tuple[int, int]:
        """As in ``Painter``."""
        tile = np.ones((1, 1), np.float32)
        maps = [("", tile) for _ in range(sum(self._probe.num_heads))]
        picture = attention_grid(np.zeros((height, width, 3), np.uint8), maps)
        return picture.shape[1], picture.shape[0]

    def _paint(self, frame: UInt8Array) -> Painted:
        height, width = frame.shape[:2]
        size = input_size(width, height, self._geometry)
        at = self._place(width, height) if self._mode == "query" else None
        with typed_memory_errors(size), self._probe as probe:
            self._predictor.predict(resize(frame, size)[None])
            stages = probe.mean() if at is None else probe.at(*at)
        if not all(np.isfinite(stage.maps).all() for stage in stages):
            return Painted(error_kind="non_finite", error="the model's attention is not finite")
        maps = [
            (f"stage {stage.stage} head {head}", map_)
            for stage in stages
            for head, map_ in enumerate(stage.maps, start=1)
        ]
        return Painted(picture=attention_grid(frame, maps, at=at))

    def _place(self, width: int, height: int) -> tuple[float, float]:
        """The query's place as shares of the frame's sides; a pixel counts from its centre."""
        if self._at_px is None:
            return 0.5, 0.5
        x, y = self._at_px
        if not (0 <= x < width and 0 <= y < height):
            message = f"--at {x:g},{y:g}: outside the frame, which is {width}x{height}"
            raise UserError(message)
        return min((x + 0.5) / width, 1.0), min((y + 0.5) / height, 1.0)
