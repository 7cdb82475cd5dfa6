"""Plans are deterministic, bounded, and know what they cannot read."""

import random
import shutil

import pytest

from jobs.plan import read_plan
from jobs.planner import Planner, gather, make_plan
from jobs.spec import check_spec
from pipeline.errors import UserError
from pipeline.layout import Generation
from pipeline.records import Slice
from pipeline.storage import open_store
from pipeline.storage.base import Store
from tests.jobs.job_parts import make_job
from tests.media import encode_cv2, picture, write_video

GENERATION = Generation()


def write_jpeg(path, size=(96, 64), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_cv2(picture(*size, seed), path.suffix))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan") / "archive"
    for index in range(9):
        write_jpeg(root / f"drive{index % 3}" / f"{index}.jpg", seed=index)
    write_jpeg(root / "portrait.png", (64, 128))
    (root / "notes.txt").write_text("no asset")
    (root / "broken.jpg").write_bytes(b"no image at all")
    (root / "clips").mkdir()
    write_video(root / "clips" / "a.mp4", num_frames=30, gop=10)
    return root


def job(archive, tmp_path, **sections):
    fields = {"input": {"url": str(archive)}, "output": {"url": str(tmp_path / "job")}}
    fields["geometry"] = {"short_side_px": 64}
    fields["shard"] = {"frames": 8}
    return check_spec({**fields, **sections}, "the job")


def planned(spec):
    planner = Planner(spec)
    return list(planner.shards()), planner.plan()


def test_every_frame_is_planned_once(archive, tmp_path):
    shards, plan = planned(job(archive, tmp_path))
    frames = [
        (part.asset, index)
        for shard in shards
        for part in shard.slices
        for index in part.frame_index
    ]
    assert len(frames) == len(set(frames)) == plan.num_frames == 9 + 1 + 1 + 30
    assert (plan.num_images, plan.num_videos, plan.num_ignored) == (11, 1, 1)
    assert plan.num_known_errors == 1
    assert ("broken.jpg", -1) in frames
    assert [shard.shard_id for shard in shards] == list(range(plan.num_shards))


def test_shards_hold_one_input_size_and_are_bounded(archive, tmp_path):
    shards, _ = planned(job(archive, tmp_path))
    for shard in shards:
        assert shard.num_frames <= 16
        assert shard.input_width_px % 32 == shard.input_height_px % 32 == 0
        good = {(part.width, part.height) for part in shard.slices if part.error_kind is None}
        assert len(good) <= 1


def test_the_listing_order_does_not_matter(archive, tmp_path, monkeypatch):
    expected = planned(job(archive, tmp_path))[1].plan_id
    listing = Store.glob

    def shuffled(self, pattern, **options):
        items = list(listing(self, pattern, **options))
        random.Random(1).shuffle(items)
        yield from items

    monkeypatch.setattr(Store, "glob", shuffled)
    assert planned(job(archive, tmp_path))[1].plan_id == expected


def test_a_moved_archive_is_the_same_archive(archive, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(archive, moved)
    expected = planned(job(archive, tmp_path))[1].plan_id
    assert planned(job(moved, tmp_path))[1].plan_id == expected


def test_the_plan_follows_content_and_settings(archive, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(archive, changed)
    write_jpeg(changed / "drive0" / "0.jpg", seed=99)
    ids = {
        planned(spec)[1].plan_id
        for spec in (
            job(archive, tmp_path),
            job(changed, tmp_path),
            job(archive, tmp_path, shard={"frames": 9}),
            job(archive, tmp_path, sampling={"every_nth": 3}),
            job(archive, tmp_path, geometry={"short_side_px": 96}),
        )
    }
    assert len(ids) == 5


def test_globs_and_exclusions(archive, tmp_path):
    only = job(archive, tmp_path, input={"url": f"{archive}/**/*.mp4"})
    assert planned(only)[1].num_frames == 30
    without = job(archive, tmp_path, input={"url": str(archive), "exclude": ["drive*/*", "*.png"]})
    assert planned(without)[1].num_images == 1
    single = job(archive, tmp_path, input={"url": str(archive / "portrait.png")})
    assert planned(single)[1].num_frames == 1


def test_outputs_inside_the_archive_are_left_out(archive, tmp_path, capsys):
    record = make_job(tmp_path / "other", num_images=1, bad=False).record.to_json()
    root = tmp_path / "copy"
    shutil.copytree(archive, root)
    for folder in ("out", "sub/png/older"):
        write_jpeg(root / folder / "png" / "drive" / "a.jpg_color.png")
        (root / folder / "job.json").write_bytes(record)
    write_jpeg(root / "png" / "mine.jpg")
    # Somebody else's object of that name says nothing of what lies beside it.
    (root / "job.json").write_text("{}")
    for url in (str(root), f"{root}/**/*.*"):
        spec = job(root, tmp_path, input={"url": url}, output={"url": str(root / "out")})
        assert planned(spec)[1].num_images == 12
        assert "2 PNGs of jobs inside the archive: left out." in capsys.readouterr().err


def test_large_frames_make_small_shards(tmp_path):
    for index in range(6):
        write_jpeg(tmp_path / "a" / f"{index}.png", (4000, 500))
    fields = {"geometry": {"short_side_px": 1024}, "shard": {"frames": 64}}
    shards, _ = planned(job(tmp_path / "a", tmp_path, **fields))
    frame_bytes = 3 * shards[0].input_width_px * shards[0].input_height_px
    assert max(shard.num_frames for shard in shards) * frame_bytes <= 200 << 20
    assert len(shards) > 1


def test_the_first_shards_and_the_last_are_small(tmp_path):
    folder = tmp_path / "a"
    for index in range(330):
        write_jpeg(folder / f"{index:03}.png", (32, 32))
    spec = job(folder, tmp_path, shard={"frames": 64})
    sizes = [shard.num_frames for shard in planned(spec)[0]]
    assert sizes == [16] * 8 + [64] + [16] * 8 + [10]

    # Of a video as well.
    write_video(folder / "0.mp4", size=(32, 32), num_frames=300, gop=5)
    sizes = [shard.num_frames for shard in planned(spec)[0]]
    assert sizes == [20] * 7 + [65] * 2 + [64] * 3 + [40] + [16] * 8
    (folder / "0.mp4").rename(folder / "z.mp4")
    sizes = [shard.num_frames for shard in planned(spec)[0]]
    assert sizes == [16] * 8 + [64] * 3 + [75] + [65] * 2 + [20] * 5 + [5]


def test_an_archive_without_assets(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("x")
    with pytest.raises(UserError, match="no image, video or tar here"):
        Planner(job(tmp_path / "empty", tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        Planner(job(tmp_path / "none", tmp_path))


def test_the_archive_itself_is_no_output(archive, tmp_path):
    with pytest.raises(UserError, match="this is the archive's folder"):
        Planner(job(archive, tmp_path, output={"url": str(archive)}))


def test_an_extreme_panorama_becomes_a_row(tmp_path):
    write_jpeg(tmp_path / "a" / "wide.png", (1000, 10))
    shards, plan = planned(job(tmp_path / "a", tmp_path))
    assert shards[0].slices[0].error_kind == "too_large"
    assert plan.num_known_errors == 1


def test_the_first_plan_counts(archive, tmp_path):
    spec = job(archive, tmp_path)
    store = open_store(spec.output.url, create=True)
    assert read_plan(store, GENERATION) is None
    first = make_plan(store, GENERATION, Planner(spec))
    second = make_plan(store, GENERATION, Planner(job(archive, tmp_path, shard={"frames": 3})))
    assert second == first == read_plan(store, GENERATION)
    parts = [item.key for item in store.list("gen-0000/plan/") if item.key.endswith(".parquet")]
    assert parts == [part.key for part in first.parts]


def small(asset, frames):
    return Slice(
        asset=asset,
        kind="video",
        size_bytes=1,
        etag="",
        width=9,
        height=9,
        frame_index=tuple(range(frames)),
    )


def test_gathering_keeps_sizes_apart_and_bounds_shards():
    slices = [((32, 32), small(f"a{n}", 3), 10) for n in range(5)]
    slices.insert(1, ((64, 32), small("b", 1), 10))
    slices.append(((32, 32), small("c", 19), 10))
    gathered = [(size, [len(part.frame_index) for part in parts]) for size, parts in gather(slices)]
    assert gathered == [
        ((32, 32), [3, 3, 3, 3]),
        ((32, 32), [3]),
        ((32, 32), [19]),
        ((64, 32), [1]),
    ]


@pytest.mark.parametrize(
    ("name", "below"), [("max_pixels", lambda _: 64 * 128), ("max_file_bytes", len)]
)
def test_what_is_larger_than_the_job_allows_is_typed(archive, tmp_path, name, below):
    largest = below((archive / "portrait.png").read_bytes())
    kinds = {}
    for cap in (largest, largest - 1):
        shards, _ = planned(job(archive, tmp_path, limits={name: cap}))
        parts = [part for shard in shards for part in shard.slices]
        kinds[cap] = {part.asset: part.error_kind for part in parts}
    assert kinds[largest]["portrait.png"] is None
    assert kinds[largest - 1] == kinds[largest] | {"portrait.png": "too_large"}
