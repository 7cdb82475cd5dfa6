"""Names that a stranger chose: every file that a job writes is below its output folder."""

import os
import stat

import pytest

from jobs import cli
from jobs.spec import check_spec
from pipeline.errors import StorageError
from pipeline.layout import png_stem
from pipeline.sources.listing import list_assets
from pipeline.storage import StorageOptions, open_store
from pipeline.storage.local import LocalStore
from tests.jobs.job_parts import finish_job, plan_job
from tests.media import encode_cv2, picture

SHOWN = [
    "abs//b.jpg",
    "/abs.jpg",
    "//twice.jpg",
    "/etc/passwd.jpg",
    "back\\..\\slash.jpg",
    "new\nline.jpg",
    "quo'te\".jpg",
    "<script>alert(1)</script>.jpg",
    "%2e%2e%2fup.jpg",
    "a;rm -rf $HOME `id` $(id).jpg",
    "tab\there.jpg",
    "\x1b[31mred.jpg",
    "ü/日本.jpg",
    "long" * 60 + ".jpg",
    "three.../dots.jpg",
]
# A segment that begins with a dot is hidden, so these are never read.
HIDDEN = ["../../up.jpg", "../up.jpg", "a/../../up.jpg", "./here.jpg", "a/./b.jpg", ".hidden.jpg"]


@pytest.fixture
def jpeg():
    return encode_cv2(picture(), ".jpg")


def everything_below(folder):
    return {path for path in folder.rglob("*") if not path.is_dir()}


def run_job(folder, url, storage=None):
    """Plan, publish, with pictures, and finish; the job."""
    fields = {
        "input": {"url": url, "storage": storage or {}},
        "output": {"url": str(folder / "work" / "job"), "png": True},
        "geometry": {"short_side_px": 64},
        "shard": {"frames": 4},
    }
    job = plan_job(check_spec(fields, "the job"))
    job.publish(range(job.plan.num_shards))
    finish_job(job)
    return job


def check_all_inside(folder, job, num_good, before):
    made = everything_below(folder) - before
    output = folder / "work" / "job"
    assert made
    assert all(path.resolve().is_relative_to(output.resolve()) for path in made)
    colours = [path for path in made if path.name.endswith("_color.png")]
    assert len(colours) == num_good
    assert all(path.is_relative_to(output / "png") for path in colours)
    assert all(str(path).isprintable() for path in made)


def test_keys_of_s3_never_lead_out_of_the_output(tmp_path, moto_server, jpeg):
    """moto, for seaweedfs folds slashes."""
    import boto3
    from moto.s3.models import s3_backends

    client = boto3.client("s3", endpoint_url=moto_server, region_name="us-east-1")
    client.create_bucket(Bucket="hostile")
    shown = [key for key in SHOWN if "\n" not in key]  # moto's router does not know them
    for key in shown:
        client.put_object(Bucket="hostile", Key=key, Body=jpeg)
    (account,) = s3_backends
    for key in HIDDEN:  # no client sends some of these, but a store may list them
        s3_backends[account]["aws"].put_object("hostile", key, jpeg)
    storage = {"endpoint_url": moto_server}
    listing = list_assets(open_store("s3://hostile", StorageOptions(**storage)))
    assert len(listing.assets) == len(shown)
    assert listing.num_hidden == len(HIDDEN)
    before = everything_below(tmp_path)
    job = run_job(tmp_path, "s3://hostile", storage)
    check_all_inside(tmp_path, job, len(shown), before)
    assert cli.run(["verify", job.store.url]) == 0


def test_real_s3_too(tmp_path, s3_server, s3_bucket_url, jpeg):
    store = open_store(s3_bucket_url)
    refused = ("//", "..", "\x1b")  # by the server
    names = [name for name in SHOWN if name[0] != "/" and not any(r in name for r in refused)]
    assert len(names) >= 8
    for key in names:
        store.put(key, jpeg)
    before = everything_below(tmp_path)
    check_all_inside(tmp_path, run_job(tmp_path, s3_bucket_url), len(names), before)


def test_local_names_of_any_bytes(tmp_path, jpeg):
    archive = tmp_path / "archive"
    archive.mkdir()
    names = [
        b"latin-\xe9.jpg",
        b"\xff\xfe.jpg",
        b"new\nline.jpg",
        b"quo'te\".jpg",
        b"<script>.jpg",
        b"%2e%2e%2f.jpg",
        b"x" * 240 + b".jpg",
        b"\\..\\..\\up.jpg",
        b"-rf.jpg",
    ]
    for name in names:
        (archive / os.fsdecode(name)).write_bytes(jpeg)
    before = everything_below(tmp_path)
    job = run_job(tmp_path, str(archive))
    check_all_inside(tmp_path, job, len(names), before)
    assert cli.run(["verify", job.store.url]) == 0


def test_links_in_an_archive_are_followed_and_their_pictures_stay_inside(tmp_path, jpeg):
    """Archives are often made of links; what is written bears the link's name."""
    outside = tmp_path / "outside"
    archive = tmp_path / "archive"
    for folder in (outside / "drive", archive):
        folder.mkdir(parents=True)
    (outside / "drive" / "a.jpg").write_bytes(jpeg)
    (archive / "linked").symlink_to(outside / "drive")
    (archive / "file.jpg").symlink_to(outside / "drive" / "a.jpg")
    (archive / "ring").symlink_to(archive)
    (archive / "dead.jpg").symlink_to(outside / "none.jpg")
    before = everything_below(tmp_path)
    job = run_job(tmp_path, str(archive))
    check_all_inside(tmp_path, job, 2, before)
    assert (tmp_path / "work" / "job" / "png" / "linked" / "a.jpg_color.png").is_file()


@pytest.mark.parametrize(
    ("asset", "expected"),
    [
        ("../../x.jpg", "png/%2E%2E/%2E%2E/x.jpg"),
        ("./x.jpg", "png/%2E/x.jpg"),
        ("/x.jpg", "png/%2Fx.jpg"),
        ("/../x.jpg", "png/%2F../x.jpg"),
        ("..x/...", "png/..x/..."),
    ],
)
def test_a_picture_s_name_is_a_path_below_the_tree(asset, expected):
    """Also of an asset that no listing of ours gives: the name comes from a table in storage."""
    stem = png_stem(asset, 0, is_video=False)
    assert stem == expected
    assert os.path.normpath(stem).startswith("png/")


def placed_by(uid, link, target):
    link.symlink_to(target)
    os.lchown(link, uid, uid)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's link")
@pytest.mark.parametrize("place", ["png", "gen-0000/data", "lease"])
def test_a_folder_s_link_that_a_stranger_placed_is_not_written_through(tmp_path, place):
    outside, output = tmp_path / "outside", tmp_path / "job"
    outside.mkdir()
    (output / place).parent.mkdir(parents=True)
    placed_by(12345, output / place, outside)
    store = open_store(str(output))
    for write in (store.put, store.create):
        with pytest.raises(StorageError, match="a link that another user"):
            write(f"{place}/below/x.png", b"data")
        with pytest.raises(StorageError, match="a link that another user"):
            write(f"{place}/x.png", b"data")
    assert list(outside.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's link")
def test_nothing_is_deleted_through_a_stranger_s_link(tmp_path):
    outside, output = tmp_path / "outside", tmp_path / "job"
    outside.mkdir()
    (outside / "x").write_bytes(b"somebody's")
    output.mkdir()
    placed_by(12345, output / "below", outside)
    with pytest.raises(StorageError, match="a link that another user"):
        open_store(str(output)).delete(["below/x"])
    assert (outside / "x").exists()
    placed_by(12345, output / "file", outside / "x")
    open_store(str(output)).delete(["file"])
    assert [path.name for path in output.iterdir()] == ["below"]
    assert (outside / "x").exists()


def test_one_s_own_link_is_written_through(tmp_path):
    """To keep the pictures on another disk, say."""
    outside, output = tmp_path / "outside", tmp_path / "job"
    outside.mkdir()
    output.mkdir()
    (output / "png").symlink_to(outside)
    LocalStore(str(output)).put("png/a/x.png", b"data")
    assert (outside / "a" / "x.png").read_bytes() == b"data"


def test_a_file_s_link_is_replaced_not_written_through(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "x").symlink_to(outside)
    store = LocalStore(str(tmp_path / "job"))
    store.put("x", b"data")
    assert outside.read_bytes() == b"mine"
    assert stat.S_ISREG((tmp_path / "job" / "x").lstat().st_mode)
