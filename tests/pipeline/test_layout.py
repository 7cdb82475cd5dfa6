"""Names on storage: people and scripts rely on them."""

import pytest

from pipeline.layout import (
    PNG_CLASS_SUFFIXES,
    PNG_DEPTH_SUFFIX,
    Generation,
    attempt_of,
    death_of,
    decode_death_of,
    png_stem,
    shard_of,
)

ATTEMPT = "0123456789abcdef" * 2


def test_keys_are_those_of_the_design():
    generation = Generation(0)
    assert generation.plan_key == "gen-0000/plan/plan.json"
    assert generation.data_key(42, ATTEMPT) == f"gen-0000/data/shard-00000042-{ATTEMPT}.parquet"
    assert generation.commit_key(42) == "gen-0000/commit/00000/shard-00000042.json"
    assert generation.commit_key(12_345) == "gen-0000/commit/00012/shard-00012345.json"
    assert generation.success_key == "gen-0000/_SUCCESS.json"
    assert generation.png_done_key(42).startswith("gen-0000/png-done/")


def test_names_read_back():
    generation = Generation(3)
    assert shard_of(generation.commit_key(7)) == 7
    assert attempt_of(generation.data_key(7, ATTEMPT)) == (7, ATTEMPT)
    assert attempt_of("gen-0000/data/other.parquet") is None
    assert shard_of("gen-0000/commit/00000/x.json") is None
    frame, whole = (generation.death_key(7, place, ATTEMPT) for place in (12, "shard"))
    decoding = generation.decode_death_key(7, 12, "timeout", ATTEMPT)
    assert [death_of(key) for key in (frame, whole, decoding)] == [(7, 12), (7, "shard"), None]
    assert [decode_death_of(key) for key in (frame, whole)] == [None, None]
    assert decode_death_of(decoding) == (12, "timeout")
    assert decoding.startswith(generation.shard_attempts_prefix(7))


def test_png_names_mirror_the_archive():
    assert png_stem("drive/a.mp4", 123, is_video=True) == "png/drive/a.mp4/000123"
    assert png_stem("drive/a.jpg", 0, is_video=False) == "png/drive/a.jpg"


@pytest.mark.parametrize("suffix", [*PNG_CLASS_SUFFIXES, PNG_DEPTH_SUFFIX])
def test_no_folder_lies_where_a_png_has_to_go(suffix):
    png = f"{png_stem('d/a.png', 0, is_video=False)}{suffix}"
    assert png == f"png/d/a.png{suffix}"
    below = png_stem(f"d/a.png{suffix}/b.png", 0, is_video=False)
    assert below == f"png/d/a.png{suffix.removesuffix('.png')}%2Epng/b.png"
    frame = f"{png_stem('v.mp4', 7, is_video=True)}{suffix}"
    assert not png_stem(f"v.mp4/000007{suffix}/b.mp4", 1, is_video=True).startswith(f"{frame}/")
    # A picture of that name has longer ones.
    assert png_stem(f"d/a.png{suffix}", 0, is_video=False) == png


@pytest.mark.parametrize("name", ["x" * 255 + ".jpg", "ä" * 130, "%0A" * 90])
def test_png_names_fit_a_file_system(name):
    stem = png_stem(f"d/{name}", 0, is_video=False)
    assert len(f"{stem.rpartition('/')[2]}_labelTrainIds.png".encode()) <= 255
    assert stem != png_stem(f"d/{name}2", 0, is_video=False)


def test_a_name_that_looks_cut_is_no_name_that_was(tmp_path):
    long = "L" * 250
    cut = png_stem(f"{long}/x.png", 0, is_video=False).split("/")[1]
    assert cut.startswith("LLL")
    assert cut != long
    for stem in (
        png_stem(f"{cut}/x.png", 0, is_video=False),
        png_stem(cut, 0, is_video=False),
        png_stem(cut, 0, is_video=True),
    ):
        assert stem.split("/")[1] != cut
        assert len(stem.split("/")[1]) <= 220


def test_no_path_is_too_long():
    deep = "/".join(["%01" * 80] * 38)
    stems = {
        png_stem(f"{folder}/{name}", 7, is_video=is_video)
        for folder in (deep, deep[3:])
        for name in ("x.png", "y.png", "z" * 300)
        for is_video in (False, True)
    }
    assert len(stems) == 12
    for stem in stems:
        assert len(stem) <= 800
        assert all(len(name) <= 220 for name in stem.split("/"))
    assert png_stem(f"{deep}/x.mp4", 8, is_video=True).endswith("/000008")
    # What looks like such a path is another.
    short = png_stem(f"{deep}/x.png", 0, is_video=False).removeprefix("png/")
    assert png_stem(short, 0, is_video=False) != f"png/{short}"
