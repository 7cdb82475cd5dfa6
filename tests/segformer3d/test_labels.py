import subprocess
import sys

import numpy as np
import pytest

from segformer3d import labels
from segformer3d.labels import CLASSES, IGNORE_ID, PALETTE

TABLES = [
    labels.CAMVID_TO_TRAIN_ID,
    labels.BDD100K_TO_TRAIN_ID,
    labels.LABEL_ID_TO_TRAIN_ID,
    labels.TRAIN_ID_TO_LABEL_ID,
]
CAMVID = {
    "sky": 0,
    "building": 1,
    "pole": 2,
    "road": 3,
    "sidewalk": 4,
    "vegetation": 5,
    "traffic sign": 6,
    "fence": 7,
    "car": 8,
    "person": 9,
    "rider": 10,
}


def test_classes_are_in_train_id_order_and_distinct():
    assert [entry.train_id for entry in CLASSES] == list(range(19))
    for values in (
        {entry.label_id for entry in CLASSES},
        {entry.name for entry in CLASSES},
        {entry.color for entry in CLASSES},
    ):
        assert len(values) == 19


def test_label_ids_are_those_cityscapes_evaluates():
    expected = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    assert [entry.label_id for entry in CLASSES] == expected


def test_palette_is_rgb_with_ignored_pixels_black():
    assert PALETTE.shape == (256, 3)
    assert PALETTE.dtype == np.uint8
    assert PALETTE[0].tolist() == [128, 64, 128]
    assert PALETTE[11].tolist() == [220, 20, 60]
    assert not PALETTE[19:].any()


@pytest.mark.parametrize("table", [*TABLES, PALETTE])
def test_tables_cover_a_byte_and_are_read_only(table):
    assert len(table) == 256
    assert table.dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 1


def test_camvid_values_reach_the_class_of_the_same_thing():
    for name, value in CAMVID.items():
        assert CLASSES[labels.CAMVID_TO_TRAIN_ID[value]].name == name
    assert (labels.CAMVID_TO_TRAIN_ID[11:] == IGNORE_ID).all()


@pytest.mark.parametrize("train_id", [18, IGNORE_ID])
def test_camvid_bicyclist_can_be_chosen(train_id):
    table = labels.camvid_to_train_ids(bicyclist_train_id=train_id)
    assert table[10] == train_id
    assert (np.delete(table, 10) == np.delete(labels.CAMVID_TO_TRAIN_ID, 10)).all()


def test_bdd100k_keeps_the_19_and_ignores_the_rest():
    assert labels.BDD100K_TO_TRAIN_ID[:19].tolist() == list(range(19))
    assert (labels.BDD100K_TO_TRAIN_ID[19:] == IGNORE_ID).all()


def test_label_ids_go_there_and_back():
    train_ids = np.arange(19)
    label_ids = labels.TRAIN_ID_TO_LABEL_ID[train_ids]
    assert (labels.LABEL_ID_TO_TRAIN_ID[label_ids] == train_ids).all()
    assert (labels.LABEL_ID_TO_TRAIN_ID == IGNORE_ID).sum() == 256 - 19
    assert labels.TRAIN_ID_TO_LABEL_ID[IGNORE_ID] == 0


@pytest.mark.parametrize(
    "module", ["segformer3d.labels", "segformer3d.draw", "segformer3d.scenes", "jobs.demo_archive"]
)
def test_module_imports_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
