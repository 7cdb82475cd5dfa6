"""What every data set gives: a frame with what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol

from segformer3d.labels import CAMVID_GROUPS, NUM_CLASSES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IDENTITY_GROUPS: Final = tuple(range(NUM_CLASSES))
COARSE_GROUPS: Final = CAMVID_GROUPS

DepthKind = Literal["metric", "relative", "none"]


class DatasetError(ValueError):
    """A data set that cannot be used; the message is one line and says how to mend it."""


@dataclass(frozen=True)
class Sample:
    """A frame and what is known of it.

    Attributes:
        name: Unique in its data set.
        image: uint8 (H, W, 3), RGB.
        class_ids: uint8 (H, W), train ids, 255 where unknown; None without any.
        depth: float32 (H, W), in the units of the data set's depth (metres unless it says
            otherwise), 0 where unknown; None without any.
    """

    name: str
    image: NDArray[np.uint8]
    class_ids: NDArray[np.uint8] | None = None
    depth: NDArray[np.float32] | None = None


class SampleSource(Protocol):
    """An indexed data set.

    Attributes:
        groups: 19 train ids: the label that stands for each class in `class_ids`. Where several
            classes share a label (CamVid's bicyclist is rider and bicycle), any of them is right.
        depth_kind: What its depths are: metres, without a unit, or none at all.
    """

    groups: tuple[int, ...]
    depth_kind: DepthKind

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Read one sample."""
        ...
