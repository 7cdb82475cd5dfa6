"""Each layout built by hand with known values, incomplete, and hostile."""

import json

import cv2
import numpy as np
import pytest

from segformer3d.datasets import COARSE_GROUPS, DatasetError
from segformer3d.datasets.registry import open_dataset
from tests.media import write_video

RGB = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
CITY, BASE = "bonn", "bonn_000001_000019"


def write_png(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = values[..., ::-1] if values.ndim == 3 else values
    ok, data = cv2.imencode(".png", np.ascontiguousarray(ordered))
    assert ok
    path.write_bytes(data.tobytes())


def write_npy(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


def cityscapes_file(root, folder, ending, base=BASE):
    return root / folder / "val" / CITY / f"{base}_{ending}"


@pytest.fixture
def cityscapes(tmp_path):
    root = tmp_path / "cityscapes"
    write_png(cityscapes_file(root, "leftImg8bit", "leftImg8bit.png"), RGB)
    ids = np.full((4, 6), 7, np.uint8)
    ids[0, :4] = 26, 0, 33, 255
    write_png(cityscapes_file(root, "gtFine", "gtFine_labelIds.png"), ids)
    codes = np.full((4, 6), 1 + 256 * 10, np.uint16)
    codes[0, :3] = 0, 1, 257
    write_png(cityscapes_file(root, "disparity", "disparity.png"), codes)
    camera = cityscapes_file(root, "camera", "camera.json")
    camera.parent.mkdir(parents=True)
    camera.write_text(json.dumps({"extrinsic": {"baseline": 0.2}, "intrinsic": {"fx": 2000.0}}))
    return root


def test_cityscapes(cityscapes):
    source = open_dataset(f"cityscapes:{cityscapes}")
    assert (len(source), source.depth_kind, source.groups) == (1, "metric", tuple(range(19)))
    sample = source[0]
    assert sample.name == f"{CITY}/{BASE}"
    assert np.array_equal(sample.image, RGB)
    assert sample.class_ids[0].tolist() == [13, 255, 18, 255, 0, 0]
    # 0 is unknown, 1 is infinitely far, 257 is a disparity of 1: 0.2 m * 2000 px / 1 px.
    assert sample.depth[0].tolist() == [0, 0, 400, 40, 40, 40]
    assert sample.depth.dtype == np.float32


def test_cityscapes_without_some_supervision(cityscapes):
    other = "bonn_000002_000019"
    write_png(cityscapes_file(cityscapes, "leftImg8bit", "leftImg8bit.png", other), RGB)
    cityscapes_file(cityscapes, "gtFine", "gtFine_labelIds.png").unlink()
    source = open_dataset(f"cityscapes:{cityscapes}?split=val")
    assert source[0].class_ids is None
    assert source[0].depth is not None
    assert (source[1].class_ids, source[1].depth) == (None, None)
    cityscapes_file(cityscapes, "camera", "camera.json").unlink()
    with pytest.raises(DatasetError, match="gtFine/val and no disparity/val"):
        open_dataset(f"cityscapes:{cityscapes}")


@pytest.mark.parametrize(
    ("folder", "ending", "write"),
    [
        ("leftImg8bit", "leftImg8bit.png", lambda path: path.write_bytes(b"")),
        ("leftImg8bit", "leftImg8bit.png", lambda path: path.write_bytes(b"no picture")),
        ("leftImg8bit", "leftImg8bit.png", lambda path: write_png(path, RGB[:2])),
        ("gtFine", "gtFine_labelIds.png", lambda path: write_png(path, RGB)),
        ("gtFine", "gtFine_labelIds.png", lambda path: write_png(path, np.zeros((4, 6), "u2"))),
        ("disparity", "disparity.png", lambda path: write_png(path, np.zeros((4, 6), "u1"))),
        ("disparity", "disparity.png", lambda path: path.write_bytes(path.read_bytes()[:60])),
        ("camera", "camera.json", lambda path: path.write_text("{")),
        ("camera", "camera.json", lambda path: path.write_bytes(b"\xff\xfe")),
        ("camera", "camera.json", lambda path: path.write_text("[1]")),
        ("camera", "camera.json", lambda path: path.write_text("[" * 100_000)),
        (
            "camera",
            "camera.json",
            lambda path: path.write_text('{"extrinsic":{"baseline":NaN},"intrinsic":{"fx":1}}'),
        ),
    ],
)
def test_hostile_cityscapes_files_are_named(cityscapes, folder, ending, write):
    path = cityscapes_file(cityscapes, folder, ending)
    write(path)
    source = open_dataset(f"cityscapes:{cityscapes}")
    with pytest.raises(DatasetError) as caught:
        source[0]
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def origin(tmp_path):
    root = tmp_path / "origin"
    write_npy(root / "images/train/0.npy", RGB / 255)
    labels = np.zeros((4, 6), np.int32)
    labels[0, :3] = -1, 18, 5
    write_npy(root / "seg_labels/train/0.npy", labels)
    depth = np.full((4, 6, 1), 0.25)
    depth[0, 0] = 0
    write_npy(root / "depth_labels/train/0.npy", depth)
    return root


@pytest.mark.parametrize("image", [RGB, RGB / 255, (RGB / 255).astype("f4"), RGB.astype("f4")])
def test_origin(origin, image):
    write_npy(origin / "images/train/0.npy", image)
    source = open_dataset(f"origin:{origin}?split=train")
    assert (len(source), source.depth_kind) == (1, "relative")
    sample = source[0]
    assert np.array_equal(sample.image, RGB)
    assert sample.image.dtype == np.uint8
    assert sample.class_ids[0].tolist() == [255, 18, 5, 0, 0, 0]
    assert sample.depth[0].tolist() == [0, 2.5, 2.5, 2.5, 2.5, 2.5]
    assert (sample.class_ids.dtype, sample.depth.dtype) == (np.uint8, np.float32)


def test_origin_without_some_supervision(origin):
    write_npy(origin / "images/train/1.npy", RGB)
    source = open_dataset(f"origin:{origin}?split=train")
    assert (source[1].class_ids, source[1].depth) == (None, None)
    (origin / "depth_labels/train/0.npy").unlink()
    assert open_dataset(f"origin:{origin}?split=train").depth_kind == "none"
    (origin / "seg_labels/train/0.npy").unlink()
    with pytest.raises(DatasetError, match="no labels"):
        open_dataset(f"origin:{origin}?split=train")
    with pytest.raises(DatasetError, match=r"no \*\.npy"):
        open_dataset(f"origin:{origin}")


HUGE = b"\x93NUMPY\x01\x00v\x00" + (
    b"{'descr': '<f8', 'fortran_order': False, 'shape': (100000, 100000), }".ljust(117) + b"\n"
)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("images", RGB[..., :2]),
        ("images", np.full((4, 6, 3), np.nan)),
        ("images", np.full((4, 6, 3), -1.0)),
        ("images", np.full((4, 6, 3), 256)),
        ("images", np.zeros((4, 6, 3), complex)),
        ("images", np.zeros((0, 6, 3))),
        ("images", np.array([{}], object)),
        ("images", HUGE),
        ("images", b""),
        ("images", b"PK\x03\x04"),
        ("seg_labels", np.full((4, 6), 19)),
        ("seg_labels", np.full((4, 6), 0.5)),
        ("seg_labels", np.full((4, 6), np.nan)),
        ("seg_labels", np.zeros((4, 5), int)),
        ("seg_labels", np.zeros((4, 6, 2), int)),
        ("depth_labels", np.full((4, 6), np.inf)),
        ("depth_labels", np.full((4, 6), np.nan)),
        ("depth_labels", np.full((4, 6), 1e300)),
        ("depth_labels", np.ones((6, 4))),
        ("depth_labels", np.full((4, 6), "far")),
    ],
)
def test_hostile_origin_files_are_named(origin, path, values):
    file = origin / path / "train/0.npy"
    if isinstance(values, bytes):
        file.write_bytes(values)
    else:
        np.save(file, values, allow_pickle=True)
    source = open_dataset(f"origin:{origin}?split=train")
    with pytest.raises(DatasetError) as caught:
        source[0]
    assert str(origin) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "own"
    write_png(root / "images/drive/a.png", RGB)
    write_png(root / "class_ids/drive/a.png", np.full((4, 6), 7, np.uint8))
    write_png(root / "depth/drive/a.png", np.full((4, 6), 2560, np.uint16))
    return root


def test_folder(folder):
    source = open_dataset(f"folder:{folder}")
    sample = source[0]
    assert (len(source), source.depth_kind, sample.name) == (1, "metric", "drive/a")
    assert np.array_equal(sample.image, RGB)
    assert np.all(sample.class_ids == 7)
    assert np.all(sample.depth == 10)
    write_png(folder / "images/b.png", RGB)
    write_npy(folder / "depth/b.npy", np.array([[-1, 0, 3, 3, 3, 3]] * 4, np.float16))
    sample = open_dataset(f"folder:{folder}")[0]
    assert (sample.name, sample.class_ids) == ("b", None)
    assert sample.depth[0].tolist() == [0, 0, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("labels", "expected"), [("train_ids", 7), ("label_ids", 0), ("camvid", 4), ("bdd100k", 7)]
)
def test_numbers_of_other_data_sets(folder, labels, expected):
    source = open_dataset(f"folder:{folder}?labels={labels}")
    assert np.all(source[0].class_ids == expected)
    assert (source.groups == COARSE_GROUPS) == (labels == "camvid")


def test_a_folder_of_splits(folder):
    folder.rename(folder.parent / "val")
    assert len(open_dataset(f"folder:{folder.parent}?split=val")) == 1
    with pytest.raises(DatasetError, match=r"no \.jpg"):
        open_dataset(f"folder:{folder.parent}?split=train")


def test_hostile_folders(folder):
    write_png(folder / "class_ids/drive/a.png", np.full((4, 6), 33, np.uint8))
    with pytest.raises(DatasetError, match="33 is no train id"):
        open_dataset(f"folder:{folder}")[0]
    write_png(folder / "class_ids/drive/a.png", np.zeros((3, 6), np.uint8))
    with pytest.raises(DatasetError, match="6 x 4, but its class ids are 6 x 3"):
        open_dataset(f"folder:{folder}")[0]
    (folder / "images/drive/a.jpg").write_bytes(b"x")
    with pytest.raises(DatasetError, match="same name"):
        open_dataset(f"folder:{folder}")
    (folder / "images/drive/a.jpg").unlink()
    for name in ("class_ids", "depth"):
        (folder / name / "drive/a.png").unlink()
    with pytest.raises(DatasetError, match="pictures:"):
        open_dataset(f"folder:{folder}")


def test_a_file_that_vanishes(folder):
    source = open_dataset(f"folder:{folder}")
    (folder / "images/drive/a.png").unlink()
    with pytest.raises(DatasetError, match=r"a\.png: No such file"):
        source[0]


def test_camvid(tmp_path):
    write_png(tmp_path / "val/images/a.png", RGB)
    write_png(tmp_path / "val/labels/a.png", np.array([[0, 1, 2, 3, 10, 11]] * 4, np.uint8))
    source = open_dataset(f"camvid:{tmp_path}")
    assert source[0].class_ids[0].tolist() == [10, 2, 5, 0, 12, 255]
    assert (source.depth_kind, source.groups) == ("none", COARSE_GROUPS)


def test_hostile_camvid_files_are_named(tmp_path, monkeypatch):
    labels = tmp_path / "val/labels/a.png"
    write_png(tmp_path / "val/images/a.png", RGB)
    write_png(labels, np.full((4, 6), 300, np.uint16))
    monkeypatch.setenv("HOME", str(tmp_path))
    source = open_dataset("camvid:~")
    with pytest.raises(DatasetError, match=r"labels/a\.png: uint16 pixels"):
        source[0]
    write_png(labels, RGB)
    with pytest.raises(DatasetError, match=r"labels/a\.png: 3 channels"):
        source[0]
    write_png(labels, np.zeros((3, 6), np.uint8))
    with pytest.raises(DatasetError, match="6 x 4, but its class ids are 6 x 3"):
        source[0]
    (tmp_path / "val/images/a.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"images/a\.png: no readable picture"):
        source[0]


def test_pictures(tmp_path):
    write_png(tmp_path / "drive/a.png", RGB)
    write_video(tmp_path / "b.mp4", num_frames=5)
    source = open_dataset(f"pictures:{tmp_path}?stride=2")
    assert [source[index].name for index in range(len(source))] == [
        "a.png",
        "b.mp4/0",
        "b.mp4/2",
        "b.mp4/4",
    ]
    assert np.array_equal(source[0].image, RGB)


@pytest.mark.parametrize("rotation_deg", [0, 90, 180, -90])
def test_pictures_are_upright(tmp_path, rotation_deg):
    path = write_video(tmp_path / "a.mp4", num_frames=1)
    (plain,) = open_dataset(f"pictures:{tmp_path}")
    path.unlink()
    write_video(path, num_frames=1, rotation_deg=rotation_deg)
    (turned,) = open_dataset(f"pictures:{tmp_path}")
    assert np.array_equal(turned.image, np.rot90(plain.image, rotation_deg // 90))


@pytest.mark.parametrize(
    "data",
    [b"", b"no video", b"#EXTM3U\n#EXTINF:1,\nb.mp4\n", b"ffconcat version 1.0\nfile b.mp4\n"],
)
def test_hostile_videos_are_named(tmp_path, data):
    write_video(tmp_path / "b.mp4", num_frames=2).rename(tmp_path / "b.video")
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(DatasetError, match=r"a\.mp4: no readable video"):
        open_dataset(f"pictures:{tmp_path}")


def test_a_hostile_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"a\.png: no readable picture"):
        open_dataset(f"pictures:{tmp_path}")[0]


def test_scenes():
    source = open_dataset("scenes:?first_seed=3&count=2")
    sample = source[1]
    assert (len(source), source.depth_kind) == (2, "metric")
    assert sample.image.shape[:2] == sample.class_ids.shape == sample.depth.shape


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("", "no data set kind ''"),
        ("camvid", "no data set kind 'camvid'"),
        ("imagenet:/data", "no data set kind 'imagenet'"),
        ("camvid:", "name a folder"),
        ("camvid:/nowhere", "/nowhere"),
        ("camvid:/data?spilt=val", "unknown option 'spilt'"),
        ("camvid:/data?split=a&split=b", "stands twice"),
        ("folder:/data?labels=coco", "labels must be one of"),
        ("cityscapes:/nowhere", "/nowhere"),
        ("scenes:/data", "has no folder"),
        ("scenes:?count=0", "from 1 on"),
        ("scenes:?count=-1", "from 1 on"),
        ("scenes:?count=" + "9" * 5000, "from 1 on"),
        ("scenes:?first_seed=two", "from 0 on"),
        ("pictures:/data?stride=0", "from 1 on"),
        ("pictures:~nobody-of-this-name/data", "no such user"),
    ],
)
def test_addresses_that_say_nothing_useful(address, named):
    with pytest.raises(DatasetError) as caught:
        open_dataset(address)
    assert named in str(caught.value)
