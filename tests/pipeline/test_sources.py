"""Listing, sampling and slicing."""

import os
import time
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StorageError, StoreUnavailableError
from pipeline.records import Asset
from pipeline.sources import listing as listing_of
from pipeline.sources.assets import AssetProbe
from pipeline.sources.listing import list_assets
from pipeline.sources.slicing import Sampling, sample_frames, slice_asset
from pipeline.storage import open_store


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode("utf-8", "surrogateescape"))


def test_lists_by_extension_sorted_and_recursive(tmp_path):
    fill(
        tmp_path,
        "b.JPG",
        "a/z.Mp4",
        "a/é.png",
        "a.ts",
        "A.webp",
        "notes.txt",
        "README",
        "x.jpg.part",
    )
    fill(tmp_path, ".hidden.jpg", "._a.jpg", ".trash/a.jpg", "a/._z.Mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    listing = list_assets(open_store(str(tmp_path)))
    assert [(asset.path, asset.kind) for asset in listing.assets] == [
        ("A.webp", "image"),
        ("a.ts", "video"),
        ("a/z.Mp4", "video"),
        ("a/é.png", "image"),
        ("b.JPG", "image"),
    ]
    assert listing.num_hidden == 4
    assert listing.ignored == {"": 1, "part": 1, "txt": 1}
    assert listing.num_ignored == 3
    assert all(asset.size_bytes and asset.etag for asset in listing.assets)


def test_fingerprints_change_with_the_content(tmp_path):
    fill(tmp_path, "a.jpg")
    (before,) = list_assets(open_store(str(tmp_path))).assets
    (tmp_path / "a.jpg").write_bytes(b"b.jpg")
    (after,) = list_assets(open_store(str(tmp_path))).assets
    assert before.size_bytes == after.size_bytes
    assert before.etag != after.etag


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    (asset,) = list_assets(open_store(str(tmp_path))).assets
    assert asset.path == "caf%E9.jpg"


def test_pattern_selects(tmp_path):
    fill(tmp_path, "a/1.jpg", "a/b/2.jpg", "c/3.jpg")
    listing = list_assets(open_store(str(tmp_path)), "a/**/*.jpg")
    assert [asset.path for asset in listing.assets] == ["a/1.jpg", "a/b/2.jpg"]


def refuse_folder(monkeypatch, path, error):
    real = os.scandir

    def scandir(folder):
        if os.fspath(folder) == str(path):
            raise error
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)


def test_what_cannot_be_read_stays_for_its_probe_to_say_why(tmp_path, monkeypatch):
    fill(tmp_path, "a.jpg", "secret.jpg", "vanished.jpg", "skipped.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    store = open_store(str(tmp_path))
    real, asked = store.fingerprint, []

    def fingerprint(key):
        asked.append(key)
        if key == "secret.jpg":
            raise StorageError("permission denied")
        if key == "vanished.jpg":
            (tmp_path / key).unlink()
        return real(key)

    monkeypatch.setattr(store, "fingerprint", fingerprint)
    listing = list_assets(store, wanted=lambda key: key != "skipped.jpg")
    assert [(asset.path, bool(asset.etag)) for asset in listing.assets] == [
        ("a.jpg", True),
        ("dangling.jpg", False),
        ("secret.jpg", False),
        ("vanished.jpg", False),
    ]
    assert "skipped.jpg" not in asked


@pytest.mark.parametrize("far", [False, True])
def test_files_far_away_are_fingerprinted_together(tmp_path, monkeypatch, far):
    names = [f"{index:03}.jpg" for index in range(200)]
    fill(tmp_path, *names)
    store, waiting, most = open_store(str(tmp_path)), set(), []

    def fingerprint(key):
        waiting.add(key)
        time.sleep(0.002 if far else 0.0)
        most.append(len(waiting))
        waiting.remove(key)
        return f"of {key}"

    monkeypatch.setattr(store, "fingerprint", fingerprint)
    # Whatever a busy machine makes of a fingerprint that takes no time.
    monkeypatch.setattr(listing_of, "_FAR_S", 0.002 if far else 100.0)
    counts = Counter()

    def watch(items, what, *, total=None, unit):
        for item in items:
            counts[what, total, unit] += 1
            yield item

    listing = list_assets(store, watch=watch)
    assert [(asset.path, asset.etag) for asset in listing.assets] == [
        (name, f"of {name}") for name in names
    ]
    assert counts == {("listing", None, "files"): 200, ("looking at files", 200, "files"): 200}
    assert (max(most) > 1) == far


@pytest.mark.parametrize("pattern", [None, "**/*.jpg", "*/*.jpg"])
def test_an_unreadable_folder_is_counted_unless_it_is_not_wanted(tmp_path, monkeypatch, pattern):
    fill(tmp_path, "good/a.jpg", "lost/b.jpg", ".lost/c.jpg")
    store = open_store(str(tmp_path))
    refuse_folder(monkeypatch, tmp_path / "lost", PermissionError(13, "Permission denied"))
    listing = list_assets(store, pattern)
    assert [asset.path for asset in listing.assets] == ["good/a.jpg"]
    assert listing.num_unreadable == 1
    listing = list_assets(store, pattern, wanted=lambda key: not key.startswith("lost/"))
    assert (len(listing.assets), listing.num_unreadable) == (1, 0)


def test_the_archive_itself_must_be_readable_and_available(tmp_path, monkeypatch):
    fill(tmp_path, "a/a.jpg", "b/b.jpg")
    store = open_store(str(tmp_path))
    with monkeypatch.context() as patch:
        refuse_folder(patch, tmp_path, PermissionError(13, "Permission denied"))
        with pytest.raises(StorageError, match="permission denied"):
            list_assets(store)
    refuse_folder(monkeypatch, tmp_path / "a", OSError(5, "Input/output error"))
    with pytest.raises(StoreUnavailableError, match="Input/output error"):
        list_assets(store)


def video(pts, keyframes, *, time_base=Fraction(1, 30), **fields):
    asset = Asset(path="v.mp4", kind="video", size_bytes=9, etag="e")
    return AssetProbe(
        asset=asset,
        width=96,
        height=64,
        pts=tuple(pts),
        keyframe_pts=tuple(keyframes),
        time_base=time_base,
        **fields,
    )


def test_every_nth():
    assert sample_frames(range(10), Fraction(1, 30), Sampling(every_nth=4)) == [0, 4, 8]


@pytest.mark.parametrize(
    ("pts", "per_second", "fps", "expected"),
    [
        (range(30), 30, 10.0, list(range(0, 30, 3))),
        (range(30), 30, 30.0, list(range(30))),
        (range(30), 30, 99.0, list(range(30))),
        # Ticks that a container rounded to milliseconds.
        ([0, 33, 67, 100, 133, 167], 1000, 30.0, [0, 1, 2, 3, 4, 5]),
        ([0, 33, 67, 100, 133, 167], 1000, 15.0, [0, 2, 4]),
        # A gap: the first frame after it stands for the instants inside it.
        ([0, 1, 2, 50, 51, 52], 10, 5.0, [0, 2, 3, 5]),
        ([7, 8, 9, 10], 1, 0.5, [0, 2]),
        ([5], 1, 0.001, [0]),
        ([], 1, 5.0, []),
    ],
)
def test_frames_per_second(pts, per_second, fps, expected):
    sampling = Sampling(frames_per_second=fps)
    assert sample_frames(pts, Fraction(1, per_second), sampling) == expected


@pytest.mark.parametrize(
    "wrong",
    [{"every_nth": 0}, {"frames_per_second": 0.0}, {"every_nth": 2, "frames_per_second": 1.0}],
)
def test_wrong_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match=r"every_nth|frames_per_second"):
        Sampling(**wrong)


def test_cuts_at_the_first_keyframe_after_the_target():
    slices = slice_asset(video(range(100), range(0, 100, 12)), target_frames=20)
    assert [part.frame_index[0] for part in slices] == [0, 24, 48, 72, 96]
    assert all(part.seek_pts == part.pts[0] for part in slices)


def test_cuts_in_the_middle_where_keyframes_are_rare():
    slices = slice_asset(video(range(100), [0, 90]), target_frames=20)
    assert [len(part.pts) for part in slices] == [40, 40, 20]
    assert [part.seek_pts for part in slices] == [0, 0, 0]


def test_the_first_frames_go_into_small_slices():
    frames = video(range(300), range(0, 300, 5))
    slices = slice_asset(frames, target_frames=64, num_small=50)
    assert [len(part.pts) for part in slices] == [20, 20, 20, 65, 65, 65, 45]
    assert slice_asset(frames, target_frames=64, num_small=0) == slice_asset(frames)
    few = slice_asset(frames, target_frames=10, num_small=50)
    assert few == slice_asset(frames, target_frames=10)


def test_the_last_frames_go_into_small_slices():
    frames = video(range(300), range(0, 300, 5))
    slices = slice_asset(frames, target_frames=64, num_small_last=50)
    assert [len(part.pts) for part in slices] == [65, 65, 65, 65, 20, 20]
    # Fewer than that are all small, with either.
    whole = [len(part.pts) for part in slice_asset(frames, num_small_last=1000)]
    assert whole == [20] * 15 == [len(part.pts) for part in slice_asset(frames, num_small=1000)]


@given(
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=200),
    every=st.integers(1, 7),
    target=st.integers(1, 30),
    data=st.data(),
)
def test_slices_partition_the_sampled_frames(steps, every, target, data):
    pts = [sum(steps[:index]) for index in range(len(steps))]
    keyframes = sorted({pts[0], *data.draw(st.lists(st.sampled_from(pts)))})
    probe = video(pts, keyframes)
    slices = slice_asset(probe, sampling=Sampling(every_nth=every), target_frames=target)
    assert [rank for part in slices for rank in part.frame_index] == list(range(0, len(pts), every))
    for part in slices:
        assert part.pts == tuple(pts[rank] for rank in part.frame_index)
        assert part.pts_s == tuple(tick / 30 for tick in part.pts)
        assert 1 <= len(part.pts) <= 2 * target
        assert part.seek_pts == max(tick for tick in keyframes if tick <= part.pts[0])
    assert slices == slice_asset(probe, sampling=Sampling(every_nth=every), target_frames=target)


def test_missing_frames_come_last_with_their_error():
    probe = video(
        range(10), [0], num_missing=25, missing_kind="count_mismatch", missing_error="gone"
    )
    slices = slice_asset(probe, target_frames=10)
    assert [part.frame_index for part in slices] == [
        tuple(range(10)),
        tuple(range(10, 20)),
        tuple(range(20, 30)),
        tuple(range(30, 35)),
    ]
    assert [part.error_kind for part in slices] == [None] + ["count_mismatch"] * 3
    sampled = slice_asset(probe, sampling=Sampling(every_nth=4), target_frames=100)
    assert [part.frame_index for part in sampled] == [(0, 4, 8), (12, 16, 20, 24, 28, 32)]


def test_very_many_missing_frames_are_one_entry():
    probe = video(range(10), [0], num_missing=100_001, missing_kind="count_mismatch")
    assert slice_asset(probe)[-1].frame_index == (10,)


def test_images_and_failures_are_one_slice():
    image = AssetProbe(
        asset=Asset(path="a.jpg", kind="image", size_bytes=9, etag="e"), width=4, height=3
    )
    (part,) = slice_asset(image)
    assert (part.frame_index, part.pts, part.seek_pts) == ((0,), (), None)
    failed = AssetProbe(asset=image.asset, error_kind="corrupt", error="no")
    (part,) = slice_asset(failed)
    assert (part.frame_index, part.error_kind, part.error) == ((-1,), "corrupt", "no")
