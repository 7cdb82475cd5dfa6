"""Tar files are read where they lie: whatever one holds, its members alone are planned."""

import io
import tarfile

import numpy as np
import pytest

from jobs.plan import Planner
from jobs.spec import check_spec
from pipeline.decode import DecodeLimits, DecodeWorker, decode_shard
from pipeline.errors import UserError
from pipeline.geometry import resize
from pipeline.records import Asset
from pipeline.sources.listing import list_assets
from pipeline.sources.tar import MAX_NAME_BYTES
from pipeline.storage import open_store
from tests.media import encode_image, picture, read_sequentially, tar_of, write_video

SIZE = (96, 64)


def png(seed=0):
    return encode_image(picture(*SIZE, seed), "PNG")


@pytest.fixture(scope="module")
def worker():
    with DecodeWorker(DecodeLimits(deadline_s=5)) as worker:
        yield worker


@pytest.fixture
def probe(tmp_path, worker):
    """Put bytes down as ``a.tar`` and probe them."""

    def probe(data):
        (tmp_path / "a.tar").write_bytes(data)
        (asset,) = list_assets(open_store(str(tmp_path)), with_tars=True).assets
        return worker.probe_assets(str(tmp_path), [asset])[0]

    return probe


def names(probe):
    return [member.path for member in probe.members]


def planned(archive, **settings):
    spec = check_spec(
        {
            "input": {"url": str(archive), **settings},
            "output": {"url": f"{archive}-job"},
            "geometry": {"short_side_px": 64},
        },
        "the job",
    )
    planner = Planner(spec)
    shards = list(planner.shards())
    return shards, planner.plan()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_images_and_videos_by_name(probe, format):
    long = f"{'deep/' * 18}{'n' * 60}.png"
    found = probe(
        tar_of(
            [
                ("./b.png", png(1)),
                ("a.JPG", b"no image"),
                ("a.json", b"{}"),
                (long, png(2)),
                (".hidden.png", png(3)),
                ("__MACOSX/._b.png", b"fork"),
                ("inner.tar", tar_of([("c.png", png(4))])),
                ("clip.mp4", b"no video"),
            ],
            format,
        )
    )
    assert names(found) == ["a.tar/b.png", "a.tar/a.JPG", f"a.tar/{long}", "a.tar/clip.mp4"]
    assert [member.kind for member in found.members] == ["image", "image", "image", "video"]
    assert (found.error_kind, found.missing_kind) == (None, None)
    assert {member.container for member in found.members} == {"a.tar"}
    assert [member.size_bytes for member in found.members][:2] == [len(png(1)), 8]


def test_what_is_no_regular_file_is_no_member(probe):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, target in (
            ("link.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.png", tarfile.LNKTYPE, "real.png"),
            ("folder.png", tarfile.DIRTYPE, ""),
            ("pipe.png", tarfile.FIFOTYPE, ""),
            ("device.png", tarfile.CHRTYPE, ""),
        ):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, target
            tar.addfile(header)
        header = tarfile.TarInfo("real.png")
        header.size = len(png())
        tar.addfile(header, io.BytesIO(png()))
    assert names(probe(buffer.getvalue())) == ["a.tar/real.png"]


def test_names_cannot_leave_the_tar(probe):
    odd = ["/etc/x.png", "a\nb.png", "50%.png", "<script>.png", 'q"uote.png', "\udcff.png"]
    found = probe(tar_of([(name, png()) for name in ("../up.png", "a/../../b.png", *odd)]))
    assert names(found) == [
        "a.tar/%2Fetc/x.png",
        "a.tar/a%0Ab.png",
        "a.tar/50%25.png",
        "a.tar/<script>.png",
        'a.tar/q"uote.png',
        "a.tar/%FF.png",
    ]


def test_the_last_of_a_name_counts(probe, tmp_path, worker):
    found = probe(tar_of([("x.png", png(1)), ("y.png", png(2)), ("x.png", png(3))]))
    assert names(found) == ["a.tar/y.png", "a.tar/x.png"]
    (shard,), _ = planned(tmp_path)
    pixels = worker.decode_shard(shard).pixels
    assert [
        np.array_equal(got, picture(*SIZE, seed)) for got, seed in zip(pixels, (2, 3), strict=True)
    ]


def test_what_is_too_long_for_a_name_is_told(probe):
    found = probe(tar_of([("a.png", png()), (f"{'x/' * MAX_NAME_BYTES}b.png", png())]))
    assert names(found) == ["a.tar/a.png"]
    assert found.missing_kind == "unsupported"
    assert found.missing_error == "1 members with a name of over 1024 bytes: left out"


WHOLE = tar_of([("a.png", png(1)), ("b.png", png(2))])
FIRST_END = 512 + -(-len(png(1)) // 512) * 512


@pytest.mark.parametrize(
    ("data", "kind", "message", "kept"),
    [
        (b"", "truncated", "the file is empty", 0),
        (b"no tar" * 400, "corrupt", "not a tar file", 0),
        (WHOLE[:100], "truncated", "where a header is due, at byte 0", 0),
        (bytes(1024), "unsupported", "the tar holds no image or video", 0),
        (tar_of([("a.txt", b"x")]), "unsupported", "the tar holds no image or video", 0),
        (WHOLE[: FIRST_END - 600], "truncated", "the tar ends within a member", 0),
        (WHOLE[:FIRST_END], "truncated", "where a header is due, at byte", 1),
        (WHOLE[: FIRST_END + 100], "truncated", "where a header is due", 1),
        (WHOLE[: FIRST_END + 600], "truncated", "the tar ends within a member", 1),
        (WHOLE[:FIRST_END] + b"?" * 5000, "corrupt", "no member's header at byte", 1),
    ],
)
def test_damage_is_typed_and_what_came_before_it_stays(probe, data, kind, message, kept):
    found = probe(data)
    assert len(found.members) == kept
    said = (found.missing_kind, found.missing_error) if kept else (found.error_kind, found.error)
    assert said[0] == kind
    assert message in said[1]


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0"])
def test_a_size_that_leads_nowhere(probe, size):
    block = bytearray(WHOLE[FIRST_END : FIRST_END + 512])
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    found = probe(WHOLE[:FIRST_END] + bytes(block) + WHOLE[FIRST_END + 512 :])
    assert names(found) == ["a.tar/a.png"]
    assert found.missing_kind in {"corrupt", "truncated"}


def test_a_pax_header_that_points_backwards_ends(probe):
    header = tarfile.TarInfo("x.png")
    header.pax_headers = {"size": "-1024"}
    data = header.tobuf(tarfile.PAX_FORMAT)
    found = probe(WHOLE[:-1024].rstrip(b"\0").ljust(2 * FIRST_END, b"\0") + data + bytes(1024))
    assert found.error_kind is None
    assert names(found)[:2] == ["a.tar/a.png", "a.tar/b.png"]


@pytest.mark.parametrize("place", ["local", "s3"])
def test_members_are_decoded_as_files_are(tmp_path, place, request):
    clip = write_video(tmp_path / "clip.mp4", num_frames=6, gop=3).read_bytes()
    frames = [pixels for _, pixels in read_sequentially(tmp_path / "clip.mp4")]
    jpeg = encode_image(picture(*SIZE, 5), "JPEG", orientation=6)
    data = tar_of([("drive/clip.mp4", clip), ("a.png", png(1)), ("a.json", b"{}"), ("b.jpg", jpeg)])
    url = (
        str(tmp_path / "archive") if place == "local" else request.getfixturevalue("s3_bucket_url")
    )
    store = open_store(url, create=True)
    store.put("day/one.tar", data)
    store.put("plain.png", png(9))
    shards, plan = planned(url)
    assert (plan.num_images, plan.num_videos, plan.num_frames) == (3, 1, 9)
    assert plan.size_bytes == len(clip) + len(png(1)) + len(jpeg) + len(png(9))
    found = {}
    for shard in shards:
        decoded = decode_shard(shard)
        assert [frame.error for frame in decoded.frames if frame.error_kind] == []
        for frame, pixels in zip(decoded.frames, decoded.pixels, strict=True):
            found[frame.asset, frame.frame_index] = pixels
    assert len(found) == 9
    assert np.array_equal(found["day/one.tar/a.png", 0], picture(*SIZE, 1))
    assert np.array_equal(found["plain.png", 0], picture(*SIZE, 9))
    assert found["day/one.tar/b.jpg", 0].shape == (96, 64, 3)
    for index, frame in enumerate(frames):
        assert np.array_equal(found["day/one.tar/drive/clip.mp4", index], resize(frame, SIZE))
    # The archive is nothing but what it was: nothing was unpacked.
    assert sorted(item.key for item in store.list()) == ["day/one.tar", "plain.png"]


def test_a_tar_that_changed_since_planning_is_told(tmp_path, worker):
    (tmp_path / "a.tar").write_bytes(WHOLE)
    (shard,), _ = planned(tmp_path)
    (tmp_path / "a.tar").write_bytes(tar_of([("a.png", png(3)), ("b.png", png(4))]))
    kinds = {frame.error_kind for frame in worker.decode_shard(shard).frames}
    assert kinds == {"fetch"}
    (tmp_path / "a.tar").write_bytes(WHOLE[:700])
    kinds = {frame.error_kind for frame in worker.decode_shard(shard).frames}
    assert kinds == {"fetch"}


def test_plans(tmp_path):
    (tmp_path / "a.tar").write_bytes(WHOLE[: FIRST_END + 600])
    (tmp_path / "b.TAR").write_bytes(tar_of([("keep/1.png", png(1)), ("skip/2.png", png(2))]))
    (tmp_path / "c.tar").write_bytes(b"")
    shards, plan = planned(tmp_path, exclude=["**/skip/*"])
    slices = [part for shard in shards for part in shard.slices]
    assert [
        (part.asset, part.frame_index, part.error_kind) for part in slices if part.error_kind
    ] == [
        ("a.tar", (-1,), "truncated"),
        ("c.tar", (-1,), "truncated"),
    ]
    assert [part.asset for part in slices if not part.error_kind] == [
        "a.tar/a.png",
        "b.TAR/keep/1.png",
    ]
    assert planned(tmp_path, exclude=["**/skip/*"])[1].plan_id == plan.plan_id
    (tmp_path / "b.TAR").write_bytes(tar_of([("keep/1.png", png(1)), ("keep/2.png", png(2))]))
    assert planned(tmp_path, exclude=["**/skip/*"])[1].plan_id != plan.plan_id


def test_an_object_and_a_folder_of_one_name(s3_bucket_url):
    store = open_store(s3_bucket_url)
    store.put("day.tar", WHOLE)
    store.put("day.tar/a.png", png())
    with pytest.raises(UserError, match=r"day\.tar: both a tar and a folder; leave one out"):
        planned(s3_bucket_url)


def test_a_child_that_lies_about_members_is_not_believed(worker):
    from pipeline.decode import _check_member

    tar = Asset(path="a.tar", kind="tar", size_bytes=100, etag="e")
    good = {"path": "a.tar/x.png", "kind": "image", "size_bytes": 40, "etag": "e"}
    good |= {"container": "a.tar", "offset": 60}
    _check_member(Asset(**good), tar)
    for lie in (
        {"path": "b.png"},
        {"kind": "tar"},
        {"etag": "f"},
        {"container": None},
        {"offset": 61},
        {"offset": -1},
        {"size_bytes": 4.0},
    ):
        with pytest.raises(ValueError, match="a member"):
            _check_member(Asset(**good | lie), tar)
