import cv2
import numpy as np
import pytest

from segformer3d.datasets import open_dataset
from segformer3d.datasets.ground_plane import ground_plane_depth, road_top
from segformer3d.labels import CLASS_NAMES
from segformer3d.scenes import make_drive, render

ID = {name: index for index, name in enumerate(CLASS_NAMES)}
CAMERA = {"horizon_px": 4.0, "focal_px": 10.0, "height_m": 1.5}


def plane_m(row):
    return 15.0 / (row + 0.5 - 4.0)


def column(*names):
    """One column of pixels, from the top."""
    return np.array([[255 if name == "?" else ID[name]] for name in names], np.uint8)


def depths(*names):
    return ground_plane_depth(column(*names), **CAMERA)[:, 0]


def test_ground_lies_on_the_plane():
    found = depths(*["sky"] * 4, *["road", "sidewalk", "terrain", "road"])
    np.testing.assert_allclose(found[4:], [plane_m(row) for row in range(4, 8)], rtol=1e-6)
    assert (found[:4] == 0).all()


def test_what_stands_is_as_far_as_its_foot():
    found = depths("sky", "building", "building", "building", "building", "road", "road", "road")
    np.testing.assert_allclose(found[1:5], plane_m(5), rtol=1e-6)
    assert found[0] == 0


def test_what_is_hidden_behind_another_thing_is_unknown():
    found = depths("sky", "building", "building", "car", "car", "road", "road", "road")
    np.testing.assert_allclose(found[3:5], plane_m(5), rtol=1e-6)
    assert (found[:3] == 0).all()


def test_a_sign_hangs_on_its_pole():
    found = depths("sky", "traffic sign", "pole", "pole", "pole", "sidewalk", "road", "road")
    np.testing.assert_allclose(found[1:5], plane_m(5), rtol=1e-6)
    found = depths("sky", "traffic sign", "building", "building", "pole", "road", "road", "road")
    assert found[1] == 0


def test_what_is_below_the_frame_or_unknown_says_nothing():
    assert (depths(*["sky"] * 4, *["car"] * 4) == 0).all()
    assert (depths(*["sky"] * 3, "car", "car", "?", "road", "road")[:6] == 0).all()


def test_far_ground_and_ground_above_the_horizon_are_unknown():
    camera = {"horizon_px": 4.4, "focal_px": 10.0, "height_m": 1.5}
    found = ground_plane_depth(column(*["sky"] * 3, *["road"] * 5), **camera)[:, 0]
    assert (found[:5] == 0).all()
    assert (found[5:] > 0).all()


def test_it_is_about_right_where_the_truth_is_known():
    """On a level, still camera's scene: exact on the road, about right for what stands on it."""
    drive = make_drive(3)
    still = type(drive.camera)(
        x_m=drive.camera.x_m, height_m=1.4, pitch_rad=0.0, focal_widths=0.9, sway=0.0, bonnet=0.0
    )
    fields = {name: getattr(drive, name) for name in drive.__dataclass_fields__}
    scene = render(type(drive)(**fields | {"camera": still}), 2.0, 640, 360)
    guess = ground_plane_depth(scene.class_ids, horizon_px=180.0, focal_px=0.9 * 640, height_m=1.4)
    road = (scene.class_ids == ID["road"]) & (guess > 0)
    np.testing.assert_allclose(guess[road], scene.depth_m[road], rtol=0.02)
    stands = np.isin(scene.class_ids, [ID["car"], ID["bus"], ID["truck"]]) & (guess > 0)
    assert stands.sum() > 500
    error = np.abs(guess[stands] / scene.depth_m[stands] - 1)
    assert np.median(error) < 0.35


def test_road_top():
    ids = np.full((6, 100), ID["sky"], np.uint8)
    assert road_top(ids) is None
    ids[3, :1] = ids[4:] = ID["road"]
    assert road_top(ids) == 4


def test_camvid_gives_it_to_learn_from_and_never_to_measure_with(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / "train" / folder).mkdir(parents=True)
    labels = np.zeros((60, 80), np.uint8)  # sky
    labels[30:] = 3  # road
    for name in ("A_001", "A_002"):
        cv2.imwrite(str(tmp_path / "train" / "images" / f"{name}.png"), np.zeros((60, 80, 3)))
        cv2.imwrite(str(tmp_path / "train" / "labels" / f"{name}.png"), labels)
    plain = open_dataset(f"camvid:{tmp_path}?split=train")
    assert plain[0].depth is None
    source = open_dataset(f"camvid:{tmp_path}?split=train&ground_depth_cm=140")
    assert source.depth_kind == "none"
    depth = source[0].depth
    horizon = 30 - 0.011 * 60
    expected = 0.9 * 80 * 1.4 / (np.arange(30, 60) + 0.5 - horizon)
    near = expected < 80
    np.testing.assert_allclose(depth[30:, 0][near], expected[near], rtol=1e-5)
    assert (depth[:30] == 0).all()
    assert pytest.approx(depth[59, 79]) == expected[-1]
