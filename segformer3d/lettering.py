"""Text on pictures: one lettering per size of panel, and paper to write on."""

from dataclasses import dataclass
from typing import Final

import cv2
import numpy as np
import numpy.typing as npt

U8Array = npt.NDArray[np.uint8]
Color = tuple[int, int, int]

PAPER: Final = (24, 24, 24)
INK: Final = (235, 235, 235)
FONT: Final = cv2.FONT_HERSHEY_SIMPLEX


@dataclass(frozen=True, slots=True)
class Lettering:
    """Text size for a panel of some size; one row of a legend is `row_px` high."""

    row_px: int
    scale: float
    thickness: int

    @property
    def baseline_px(self) -> int:
        """From the top of a row to the line that letters stand on."""
        return round(0.72 * self.row_px)

    def width_px(self, text: str) -> int:
        """Width of a text."""
        return int(cv2.getTextSize(text, FONT, self.scale, self.thickness)[0][0])

    def write(self, picture: U8Array, text: str, x_px: int, y_px: int, ink: Color = INK) -> None:
        """Writes `text` into the row whose top left corner is (x_px, y_px)."""
        origin = (x_px, y_px + self.baseline_px)
        cv2.putText(picture, text, origin, FONT, self.scale, ink, self.thickness, cv2.LINE_AA)


def lettering_for(width_px: int, height_px: int) -> Lettering | None:
    """Returns text that suits a panel, or None where the panel is too small to read any."""
    if width_px < 96 or height_px < 64:
        return None
    row_px = max(12, round(min(height_px * 0.05, width_px * 0.033)))
    return Lettering(row_px=row_px, scale=row_px / 36, thickness=max(1, row_px // 22))


def blank(width_px: int, height_px: int, color: Color = PAPER) -> U8Array:
    """Returns a picture of one colour, uint8 (height_px, width_px, 3)."""
    return np.full((height_px, width_px, 3), color, np.uint8)
