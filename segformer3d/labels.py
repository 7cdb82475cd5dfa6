"""The 19 Cityscapes classes and the maps of other data sets onto their train ids.

A *train id* is what the network predicts: 0 to 18, and 255 for pixels that belong to no class.
A *label id* is the number in Cityscapes' own `labelIds` pictures.
Source: Cityscapes (Cordts et al., CVPR 2016), `cityscapesscripts/helpers/labels.py`.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

U8Array = npt.NDArray[np.uint8]

IGNORE_ID: Final = 255
"""Train id of pixels that belong to no class: never trained on, never counted."""


@dataclass(frozen=True, slots=True)
class CityscapesClass:
    """One of the classes the network predicts.

    Attributes:
        train_id: The network's channel, 0 to 18.
        label_id: The id in Cityscapes' `labelIds` pictures, 7 to 33.
        name: Cityscapes' name of the class.
        color: RGB, each 0 to 255.
        category: Cityscapes' coarser group.
    """

    train_id: int
    label_id: int
    name: str
    color: tuple[int, int, int]
    category: str


CLASSES: Final = (
    CityscapesClass(0, 7, "road", (128, 64, 128), "flat"),
    CityscapesClass(1, 8, "sidewalk", (244, 35, 232), "flat"),
    CityscapesClass(2, 11, "building", (70, 70, 70), "construction"),
    CityscapesClass(3, 12, "wall", (102, 102, 156), "construction"),
    CityscapesClass(4, 13, "fence", (190, 153, 153), "construction"),
    CityscapesClass(5, 17, "pole", (153, 153, 153), "object"),
    CityscapesClass(6, 19, "traffic light", (250, 170, 30), "object"),
    CityscapesClass(7, 20, "traffic sign", (220, 220, 0), "object"),
    CityscapesClass(8, 21, "vegetation", (107, 142, 35), "nature"),
    CityscapesClass(9, 22, "terrain", (152, 251, 152), "nature"),
    CityscapesClass(10, 23, "sky", (70, 130, 180), "sky"),
    CityscapesClass(11, 24, "person", (220, 20, 60), "human"),
    CityscapesClass(12, 25, "rider", (255, 0, 0), "human"),
    CityscapesClass(13, 26, "car", (0, 0, 142), "vehicle"),
    CityscapesClass(14, 27, "truck", (0, 0, 70), "vehicle"),
    CityscapesClass(15, 28, "bus", (0, 60, 100), "vehicle"),
    CityscapesClass(16, 31, "train", (0, 80, 100), "vehicle"),
    CityscapesClass(17, 32, "motorcycle", (0, 0, 230), "vehicle"),
    CityscapesClass(18, 33, "bicycle", (119, 11, 32), "vehicle"),
)
"""The classes in the order of their train ids: `CLASSES[i].train_id == i`."""

NUM_CLASSES: Final = len(CLASSES)
CLASS_NAMES: Final = tuple(entry.name for entry in CLASSES)

_CAMVID_BICYCLIST: Final = 10
_RIDER_ID: Final = 12
# Sky, building, pole, road, pavement, tree, sign symbol, fence, car, pedestrian.
_CAMVID_TRAIN_IDS: Final = (10, 2, 5, 0, 1, 8, 7, 4, 13, 11)


def _lookup_table(pairs: dict[int, int], *, default: int = IGNORE_ID) -> U8Array:
    """Returns a read-only table of 256 entries, `default` wherever `pairs` says nothing."""
    table = np.full(256, default, np.uint8)
    for source_id, target_id in pairs.items():
        table[source_id] = target_id
    table.setflags(write=False)
    return table


def camvid_to_train_ids(*, bicyclist_train_id: int = _RIDER_ID) -> U8Array:
    """Returns the table from CamVid's 12 values (the SegNet split) to train ids.

    CamVid draws a rider and the bicycle as one region, "bicyclist", which Cityscapes splits in
    two. The default calls it rider (12): most of its pixels are of the person, and to miss a
    person is the worse mistake. Pass 18 for bicycle, or 255 to leave the region out.

    Args:
        bicyclist_train_id: Train id for CamVid's bicyclist.

    Returns:
        uint8 (256,), read-only: `table[camvid_value]`. Unlabelled (11) and unknown values give
        `IGNORE_ID`.
    """
    pairs = dict(enumerate(_CAMVID_TRAIN_IDS))
    return _lookup_table(pairs | {_CAMVID_BICYCLIST: bicyclist_train_id})


def _palette() -> U8Array:
    palette = np.zeros((256, 3), np.uint8)
    palette[:NUM_CLASSES] = [entry.color for entry in CLASSES]
    palette.setflags(write=False)
    return palette


PALETTE: Final = _palette()
"""uint8 (256, 3), read-only: RGB by train id. 255 and every unused id are black."""

CAMVID_TO_TRAIN_ID: Final = camvid_to_train_ids()
"""uint8 (256,), read-only: CamVid's value to train id; a bicyclist is a rider."""

# CamVid's 11 classes are coarser than Cityscapes' 19 (SegNet's grouping of its 32): walls count
# as building, traffic lights as sign, grass as tree, trucks, buses and trains as car.
_CAMVID_MERGED: Final = {3: 2, 6: 7, 9: 8, 14: 13, 15: 13, 16: 13, 17: 12, 18: 12}
CAMVID_GROUPS: Final = tuple(_CAMVID_MERGED.get(i, i) for i in range(NUM_CLASSES))
"""The train id that stands for each of the 19 classes in CamVid's labels."""

BDD100K_TO_TRAIN_ID: Final = _lookup_table({i: i for i in range(NUM_CLASSES)})
"""uint8 (256,), read-only. BDD100K's semantic masks (Yu et al., CVPR 2020) already hold these
19 train ids, with 255 for unknown: the table only turns values out of range into 255."""

LABEL_ID_TO_TRAIN_ID: Final = _lookup_table({entry.label_id: entry.train_id for entry in CLASSES})
"""uint8 (256,), read-only: Cityscapes' label id to train id; void and rare labels give 255.
Label id -1 (licence plate) is 255 in an 8-bit picture, so it is ignored as well."""

TRAIN_ID_TO_LABEL_ID: Final = _lookup_table(
    {entry.train_id: entry.label_id for entry in CLASSES}, default=0
)
"""uint8 (256,), read-only: the way back, for Cityscapes' evaluation server; ignored pixels
become label id 0 ("unlabeled")."""
