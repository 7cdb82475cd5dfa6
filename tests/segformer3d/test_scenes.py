import math
from dataclasses import replace

import numpy as np
import pytest

from segformer3d.labels import CLASSES, IGNORE_ID, NUM_CLASSES
from segformer3d.scenes import (
    KERB_M,
    STREET_LENGTH_M,
    THING_KINDS,
    Scene,
    Thing,
    make_drive,
    render,
)

IDS = {entry.name: entry.train_id for entry in CLASSES}
SIZE = (320, 180)


def still_drive(*things, pitch_rad=0.0, x_m=0.0):
    """A drive on an empty street with a camera that neither shakes nor sees its bonnet."""
    drive = make_drive(3)
    camera = replace(drive.camera, pitch_rad=pitch_rad, x_m=x_m, sway=0.0, bonnet=0.0)
    return replace(drive, camera=camera, things=tuple(things))


def person(z_m, *, x_m=0.0, base_m=0.0):
    return Thing("person", x_m, z_m, width_m=0.7, height_m=1.8, base_m=base_m)


@pytest.mark.parametrize("seed", range(6))
def test_scene_has_its_shapes_types_and_known_classes(seed):
    scene = render(make_drive(seed), 1.0, *SIZE)
    assert isinstance(scene, Scene)
    assert scene.frame.shape == (180, 320, 3)
    assert scene.frame.dtype == np.uint8
    assert scene.class_ids.shape == scene.depth_m.shape == (180, 320)
    assert scene.class_ids.dtype == np.uint8
    assert scene.depth_m.dtype == np.float32
    assert set(np.unique(scene.class_ids)) <= {*range(NUM_CLASSES), IGNORE_ID}
    assert len(np.unique(scene.class_ids)) >= 8
    assert np.isfinite(scene.depth_m).all()
    invalid = np.isin(scene.class_ids, [IDS["sky"], IGNORE_ID])
    assert (scene.depth_m[invalid] == 0).all()
    assert (scene.depth_m[~invalid] > 0.4).all()
    assert 20 < scene.frame.mean() < 230


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 31), (200, 40), (40, 200)])
def test_scene_at_any_size(size):
    scene = render(make_drive(1), 0.0, *size)
    assert scene.frame.shape == (size[1], size[0], 3)


@pytest.mark.parametrize("pitch_rad", [-0.02, 0.0, 0.06])
def test_road_depth_is_the_pinhole_formula(pitch_rad):
    drive = still_drive(pitch_rad=pitch_rad)
    scene = render(drive, 0.7, *SIZE)
    focal_px = drive.camera.focal_widths * SIZE[0]
    rows, columns = np.nonzero(scene.class_ids == IDS["road"])
    assert len(rows) > 5000
    slope = (rows - (SIZE[1] - 1) / 2) / focal_px
    down = slope * math.cos(pitch_rad) + math.sin(pitch_rad)
    expected = drive.camera.height_m / down
    assert np.allclose(scene.depth_m[rows, columns], expected, rtol=1e-4)


def test_pavement_lies_a_kerb_higher_and_begins_at_the_kerb():
    drive = still_drive()
    scene = render(drive, 0.0, *SIZE)
    focal_px, row = drive.camera.focal_widths * SIZE[0], SIZE[1] - 30
    columns = np.flatnonzero(scene.class_ids[row] == IDS["road"])
    across = (columns - (SIZE[0] - 1) / 2) * scene.depth_m[row, columns] / focal_px
    assert np.abs(across).max() <= drive.street.half_m
    rows, columns = np.nonzero(scene.class_ids == IDS["terrain"])
    expected = (drive.camera.height_m - KERB_M) * focal_px / (rows - (SIZE[1] - 1) / 2)
    assert np.allclose(scene.depth_m[rows, columns], expected, rtol=1e-3)


def test_near_occludes_far_in_whatever_order_they_are_listed():
    near, far = person(6.0), person(15.0)
    first = render(still_drive(near, far), 0.0, *SIZE)
    second = render(still_drive(far, near), 0.0, *SIZE)
    alone = render(still_drive(near), 0.0, *SIZE)
    assert (first.depth_m == second.depth_m).all()
    on_near = (alone.class_ids == IDS["person"]) & (alone.depth_m < 7)
    assert on_near.sum() > 200
    assert np.allclose(first.depth_m[on_near], 6.0, rtol=1e-5)


def test_a_thing_stands_where_the_pinhole_camera_puts_it():
    drive = still_drive(person(8.0, x_m=1.0))
    scene = render(drive, 0.0, *SIZE)
    focal_px = drive.camera.focal_widths * SIZE[0]
    rows, columns = np.nonzero(scene.class_ids == IDS["person"])
    feet_row = (SIZE[1] - 1) / 2 + focal_px * drive.camera.height_m / 8.0
    head_row = feet_row - focal_px * 1.8 / 8.0
    assert abs(rows.max() - feet_row) < 2
    assert abs(rows.min() - head_row) < 2
    assert abs(columns.mean() - ((SIZE[0] - 1) / 2 + focal_px * 1.0 / 8.0)) < 2


@pytest.mark.parametrize("kind", sorted(THING_KINDS))
def test_every_kind_can_be_seen_between_its_near_and_its_far_end(kind):
    thing = Thing(kind, 2.5, 9.0, width_m=1.8, height_m=2.4, length_m=4.0, style=1)
    empty = render(still_drive(), 0.0, *SIZE)
    scene = render(still_drive(thing), 0.0, *SIZE)
    changed = scene.class_ids != empty.class_ids
    assert changed.sum() > 100
    assert scene.depth_m[changed].min() > 8.0
    assert scene.depth_m[changed].max() < 13.1


def test_same_arguments_give_the_same_scene():
    for first, second in zip(
        render(make_drive(5), 1.25, *SIZE), render(make_drive(5), 1.25, *SIZE), strict=True
    ):
        assert (first == second).all()


def test_seeds_and_times_differ():
    drive = make_drive(5)
    frame = render(drive, 1.0, *SIZE).frame
    assert (frame != render(make_drive(6), 1.0, *SIZE).frame).mean() > 0.5
    assert (frame != render(drive, 1.5, *SIZE).frame).mean() > 0.3


@pytest.mark.parametrize("seed", [2, 3])  # with nothing parked just before the camera
def test_consecutive_frames_show_one_world_that_comes_nearer(seed):
    """Points of the later frame, put into the earlier camera, have the depth found there."""
    drive = make_drive(seed)
    parked = tuple(replace(thing, speed_mps=0.0) for thing in drive.things)
    drive = replace(still_drive(*parked, x_m=drive.camera.x_m), speed_mps=drive.speed_mps)
    earlier, later = render(drive, 2.0, *SIZE), render(drive, 2.1, *SIZE)
    rows, columns = np.nonzero((later.depth_m > 0) & (later.depth_m < 120))
    depth = later.depth_m[rows, columns]
    moved = depth + 0.1 * drive.speed_mps
    middle = (np.array(SIZE) - 1) / 2
    old_columns = np.rint(middle[0] + (columns - middle[0]) * depth / moved).astype(int)
    old_rows = np.rint(middle[1] + (rows - middle[1]) * depth / moved).astype(int)
    found = earlier.depth_m[old_rows, old_columns]
    agree = np.abs(found - moved) < 0.03 * moved
    assert agree.mean() > 0.9
    assert (earlier.class_ids[old_rows, old_columns] == later.class_ids[rows, columns]).mean() > 0.9


def test_traffic_moves_by_its_speed():
    car = Thing("car", -3.0, 30.0, 1.8, 1.5, 4.3, speed_mps=-10.0, style=1)
    drive = replace(still_drive(car), speed_mps=5.0)
    for time_s, expected in ((0.0, 30.0), (1.0, 15.0)):
        scene = render(drive, time_s, *SIZE)
        on_car = scene.class_ids == IDS["car"]
        assert scene.depth_m[on_car].min() == pytest.approx(expected, abs=0.05)


def test_street_repeats_so_that_a_drive_never_ends():
    drive = replace(still_drive(person(10.0)), speed_mps=10.0)
    first = render(drive, 0.0, *SIZE)
    again = render(drive, STREET_LENGTH_M / 10.0, *SIZE)
    assert (first.class_ids == again.class_ids).all()
    assert np.allclose(first.depth_m, again.depth_m, rtol=1e-4)


def test_drives_differ_in_camera_light_and_street():
    drives = [make_drive(seed) for seed in range(12)]
    for values in (
        {drive.camera for drive in drives},
        {drive.street for drive in drives},
        {drive.speed_mps for drive in drives},
    ):
        assert len(values) == 12
    assert len({drive.light for drive in drives}) >= 4


def test_many_drives_show_all_classes_but_the_train():
    seen = set()
    for seed in range(12):
        drive = make_drive(seed)
        for time_s in (0.0, 5.0):
            seen |= set(np.unique(render(drive, time_s, *SIZE).class_ids).tolist())
    assert seen >= set(range(NUM_CLASSES)) - {IDS["train"]}
