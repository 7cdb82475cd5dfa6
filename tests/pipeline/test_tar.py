"""Tar files are read where they lie: whatever one holds, its members alone are planned."""

import bz2
import gzip
import io
import lzma
import tarfile
import time

import numpy as np
import pytest

from jobs.planner import Planner, make_plan
from jobs.spec import check_spec
from pipeline.decode import DecodeLimits, DecodeWorker, decode_shard
from pipeline.errors import UserError
from pipeline.geometry import resize
from pipeline.layout import Generation
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
        "a.tar/etc/x.png",
        "a.tar/a%0Ab.png",
        "a.tar/50%25.png",
        "a.tar/<script>.png",
        'a.tar/q"uote.png',
        "a.tar/%FF.png",
    ]
    assert (found.missing_kind, found.missing_error) == (
        "unsupported",
        "left out are members: 2 named outside",
    )


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
    assert (found.missing_kind, found.missing_error) == (
        "unsupported",
        "left out are members: 1 overlong",
    )


WHOLE = tar_of([("a.png", png(1)), ("b.png", png(2))])
FIRST_END = 512 + -(-len(png(1)) // 512) * 512


@pytest.mark.parametrize(
    ("data", "kind", "message", "kept"),
    [
        (b"", "truncated", "the file is empty", 0),
        (b"no tar" * 400, "corrupt", "no member's header at byte 0", 0),
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


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_is_said_to_be_one(probe, compress):
    found = probe(compress(WHOLE))
    assert (found.members, found.error_kind) == ((), "unsupported")
    assert "a compressed tar" in found.error


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"77777777777\0"])
def test_a_size_that_leads_nowhere(probe, size):
    block = bytearray(WHOLE[FIRST_END : FIRST_END + 512])
    block[124:136] = size
    found = probe(WHOLE[:FIRST_END] + sealed(block) + WHOLE[FIRST_END + 512 :])
    assert names(found) == ["a.tar/a.png"]
    assert found.missing_kind in {"corrupt", "truncated"}


def sealed(block):
    """A header with its checksum."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def entry(name, data=b"", kind=b"0", size=None, magic=b"ustar\x0000"):
    """One entry by hand, with whatever a writer might say of itself."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124:136] = b"%011o\0" % (len(data) if size is None else size)
    block[156:157] = kind
    block[257:265] = magic
    return sealed(block) + data.ljust(-(-len(data) // 512) * 512, b"\0")


END = bytes(1024)
A, B = entry(b"a.png", png(1)), entry(b"b.png", png(2))


def test_a_sparse_member_is_told_and_costs_no_other(probe):
    old = bytearray(entry(b"old.png", png(3), b"S"))
    old[482] = 1
    more = bytearray(512)
    more[504] = 1
    holes = sealed(old[:512]) + bytes(more) + bytes(512) + bytes(old[512:])
    record = b"22 GNU.sparse.major=1\n"
    new = entry(b"x", record, b"x") + entry(b"GNUSparseFile.0/new.png", png(4), size=len(png(4)))
    found = probe(A + holes + new + B + END)
    assert names(found) == ["a.tar/a.png", "a.tar/b.png"]
    assert found.missing_error == "left out are members: 2 sparse"


def test_sizes_of_what_has_no_data_are_hints(probe):
    folders = entry(b"folder/", kind=b"5", size=1 << 20) + entry(b"l.png", kind=b"1", size=99_999)
    assert names(probe(A + folders + B + END)) == ["a.tar/a.png", "a.tar/b.png"]
    assert probe(A + folders + B + END).missing_kind is None


@pytest.mark.parametrize("hole", [bytes(512), bytes(4096), END])
def test_what_follows_an_end_mark_is_told(probe, hole):
    for data in (A + hole + B + END, tar_of([("a.png", png(1))]) + WHOLE):
        found = probe(data)
        assert names(found) == ["a.tar/a.png"]
        assert found.missing_kind == "corrupt"
        assert "more follows behind the end mark" in found.missing_error
    assert probe(A + B + END + bytes(100_000)).missing_kind is None


def test_names_as_other_tars_write_them(probe):
    gnu = bytearray(entry(b"./day/./gnu.png", png(3), magic=b"ustar  \0"))
    gnu[345:357] = b"15301712116\0"  # when it was last read
    prefixed = bytearray(entry(b"posix.png", png(4)))
    prefixed[345:355] = b"night/late"
    found = probe(
        sealed(gnu[:512])
        + bytes(gnu[512:])
        + sealed(prefixed[:512])
        + bytes(prefixed[512:])
        + entry(b"old.png", png(5), kind=b"\0", magic=bytes(8))
        + entry(b"a//b.png", png(6))
        + entry(b"x.mp4/", png(7))
        + entry(b"././@LongLink", b"long/y.mp4/\0", b"L", magic=b"ustar  \0")
        + entry(b"y", png(8))
        + entry(b"dump", b"Ya.png\0", b"D", magic=b"ustar  \0")
        + entry(b"V", kind=b"V")
        + B
        + END
    )
    wanted = ["day/gnu.png", "night/late/posix.png", "old.png", "a/b.png", "b.png"]
    assert names(found) == [f"a.tar/{name}" for name in wanted]
    assert found.missing_kind is None


@pytest.mark.parametrize(
    "records",
    [
        b"1" * 200_000,
        b"200019 comment=" + b"1" * 200_003 + b"\n",
        b"-5 path=x.png\n",
        b"0 path=x.png\n",
        b"15 path=no end!",
        b"99999 path=x.png\n",
        b"19 size=1234567890\n",
        b"17 size=-1048576\n",
        b"12 size=abc\n",
        b"11 nothing\n",
    ],
)
def test_headers_that_lie_end_the_tar_at_once(probe, records):
    started = time.monotonic()
    found = probe(A + entry(b"x", records, b"x") + B + END)
    assert names(found)[:1] == ["a.tar/a.png"]
    assert found.missing_kind in {"corrupt", "truncated"} or len(found.members) == 2
    assert time.monotonic() - started < 5


def test_endless_headers_are_read_one_by_one(probe):
    chain = entry(b"x", b"16 path=c/x.png\n", b"x") * 5000
    assert names(probe(A + chain + B + END)) == ["a.tar/a.png", "a.tar/c/x.png"]
    huge = entry(b"x", b"", b"x", size=3 << 20)
    found = probe(A + huge + bytes(4 << 20) + END)
    assert names(found) == ["a.tar/a.png"]
    assert "a header of 3145728 bytes" in found.missing_error


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


def test_nothing_that_is_left_is_the_users_mistake(tmp_path):
    (tmp_path / "a.tar").write_bytes(WHOLE)
    spec = check_spec(
        {
            "input": {"url": str(tmp_path), "exclude": ["**/*.png"]},
            "output": {"url": f"{tmp_path}-job"},
        },
        "the job",
    )
    with pytest.raises(UserError, match=r"nothing is left to annotate; look at input\.exclude"):
        make_plan(open_store(f"{tmp_path}-job", create=True), Generation(), Planner(spec))


def test_an_object_and_a_folder_of_one_name(s3_bucket_url):
    store = open_store(s3_bucket_url)
    store.put("day.tar", WHOLE)
    store.put("day.tar/a.png", png())
    with pytest.raises(UserError, match=r"day\.tar: both a tar and a folder; leave one out"):
        planned(s3_bucket_url)


def test_a_child_that_lies_about_members_is_not_believed(worker):
    from pipeline.decode_ledgers import _check_member

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
