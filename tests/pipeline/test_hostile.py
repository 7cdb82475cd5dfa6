"""Inputs that were made to hurt: what they cost is bounded, and theirs alone."""

import os
import signal
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pipeline import decode_ledgers
from pipeline.deaths import Deaths, DecodeTally, Journal
from pipeline.decode import DecodeLimits, DecodeWorker
from pipeline.errors import InputError
from pipeline.geometry import resize
from pipeline.layout import Generation
from pipeline.records import Asset, ShardSpec, Slice
from pipeline.sources import video
from pipeline.sources.listing import list_assets
from pipeline.sources.slicing import slice_asset
from pipeline.sources.video import probe_video
from pipeline.stages import DecodeShard
from pipeline.storage import open_store
from pipeline.storage.local import LocalStore
from pipeline.tables import DecodedShard, shards_to_table
from tests.media import encode_image, picture, write_video
from tests.shards import stage_context

LIMITS = DecodeLimits()
SIZE = (64, 32)


def probe(path):
    asset = Asset(path=path.name, kind="video", size_bytes=path.stat().st_size, etag="")
    with path.open("rb") as file:
        return probe_video(file, asset, LIMITS, lambda: None)


def box(name, body):
    return struct.pack(">I4s", 8 + len(body), name) + body


def rebuilt(data, start, stop, change):
    """Boxes between two places with ``change`` made to the bodies of those it names."""
    pieces = []
    while start < stop:
        size, name = struct.unpack_from(">I4s", data, start)
        body = data[start + 8 : start + size]
        if name in (b"moov", b"trak", b"mdia", b"minf", b"stbl"):
            body = rebuilt(data, start + 8, start + size, change)
        body = change.get(name, body)
        pieces.append(b"" if body is None else box(name, body))
        start += size
    return b"".join(pieces)


def write_echo(path, num_samples, sample_bytes):
    """A video whose index names the same megabytes again and again."""
    data = write_video(path, gop=1, b_frames=0, num_frames=2).read_bytes()
    media = data.index(b"mdat") + 4
    change = {
        b"stts": struct.pack(">IIII", 0, 1, num_samples, 512),
        b"stsc": struct.pack(">IIIII", 0, 1, 1, 1, 1),
        b"stsz": struct.pack(">III", 0, sample_bytes, num_samples),
        b"stco": struct.pack(">II", 0, num_samples) + struct.pack(">I", media) * num_samples,
        b"stss": None,
        b"ctts": None,
        b"edts": None,
    }
    data = rebuilt(data, 0, len(data), change)
    path.write_bytes(data + box(b"free", bytes(sample_bytes)))


def test_an_index_that_names_the_same_data_again_and_again_is_not_followed(tmp_path):
    write_echo(tmp_path / "few.mp4", 10, 1 << 20)
    assert len(probe(tmp_path / "few.mp4").pts) == 10
    write_echo(tmp_path / "many.mp4", 20_000, 1 << 20)
    started = time.monotonic()
    with pytest.raises(InputError, match="names the same data many times") as caught:
        probe(tmp_path / "many.mp4")
    assert caught.value.kind == "corrupt"
    assert time.monotonic() - started < 10  # 20 GB otherwise


def test_more_frames_than_a_plan_should_hold_are_too_many(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", num_frames=12)
    monkeypatch.setattr(video, "_MAX_FRAMES", 12)
    assert len(probe(path).pts) == 12
    monkeypatch.setattr(video, "_MAX_FRAMES", 11)
    with pytest.raises(InputError) as caught:
        probe(path)
    assert caught.value.kind == "too_large"


def slice_of(captured_at_us, pts_s):
    return Slice(
        asset="a.mp4",
        kind="video",
        size_bytes=1,
        etag="",
        width=96,
        height=64,
        pts=(1,),
        pts_s=(pts_s,),
        captured_at_us=captured_at_us,
    )


@pytest.mark.parametrize("pts_s", [1e14, 9e15, -1e14])
def test_times_that_no_calendar_holds_are_unknown(pts_s):
    (record,) = decode_ledgers._records(slice_of(1_600_000_000_000_000, pts_s))
    assert record.captured_at_us is None
    assert record.pts_s == pts_s


def test_a_child_that_talks_nonsense_cannot_spoil_a_plan_or_a_row():
    assert decode_ledgers._one_line("two\nlines \udcff\x1b[31m\0") == "two lines ?\ufffd[31m\ufffd"
    assert len(decode_ledgers._one_line("x" * 10_000)) == 500
    assert decode_ledgers._one_line("\n") == "no reason was given"
    asset = Asset(path="a.mp4", kind="video", size_bytes=1, etag="")
    sound = {"width": 96, "height": 64, "pts": (0, 1), "keyframe_pts": (0,)}
    decode_ledgers._check_sense(decode_ledgers.AssetProbe(asset=asset, **sound))
    for nonsense in (
        {"width": -1},
        {"height": 1 << 63},
        {"pts": (0, 1 << 63)},
        {"pts": (0, "1")},
        {"pts": (0.5,)},
        {"width": True},
        {"num_missing": -1},
        {"time_base": decode_ledgers.Fraction(0)},
    ):
        with pytest.raises(ValueError, match="a probe"):
            decode_ledgers._check_sense(
                decode_ledgers.AssetProbe(asset=asset, **{**sound, **nonsense})
            )


# At the start of every child: some inputs crash it, hang it or eat its memory while they are probed
# or decoded, and each try is written down.
TRAPS = """
import os, signal, sys, time
if "pipeline.decode_child" in sys.orig_argv:
    from pathlib import Path
    import av, cv2
    from PIL import Image
    folder = Path(__file__).parent
    def spring(data):
        for word in (b"SEGV", b"HANG", b"BOMB", b"BOTH"):
            if word in data:
                with (folder / word.decode()).open("a") as file:
                    file.write("x")
                    is_odd = file.tell() % 2
                if word == b"SEGV" or (word == b"BOTH" and is_odd):
                    os.kill(os.getpid(), signal.SIGSEGV)
                if word in (b"HANG", b"BOTH"):
                    time.sleep(3600)
                hoard = [bytearray(1 << 20) for _ in range(100_000)]
    imdecode, opened, av_open = cv2.imdecode, Image.open, av.open
    def trapped_imdecode(buffer, flags):
        if b"when decoded" in buffer.tobytes():
            spring(buffer.tobytes())
        return imdecode(buffer, flags)
    def trapped_open(file, *args, **options):
        if b"when probed" in file.getvalue():
            spring(file.getvalue())
        return opened(file, *args, **options)
    def trapped_av_open(file, *args, **options):
        data = file._file.read()
        file._file.seek(0)
        if b"when probed" in data:
            spring(data)
        return av_open(file, *args, **options)
    cv2.imdecode = trapped_imdecode
    Image.open = trapped_open
    av.open = trapped_av_open
"""


@pytest.fixture
def traps(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("traps")
    (folder / "sitecustomize.py").write_text(TRAPS)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def tries(traps, word):
    path = traps / word.decode()
    return len(path.read_text()) if path.exists() else 0


def deadline_s(word):
    return 1.0 if word in {b"HANG", b"BOTH"} else 20.0


@pytest.mark.parametrize(
    ("name", "word", "kind", "attempts"),
    [
        ("b.mp4", b"SEGV", "crash", 3),
        ("b.png", b"SEGV", "crash", 3),
        ("b.png", b"HANG", "timeout", 2),
        ("b.png", b"BOMB", "out_of_memory", 1),
        ("b.png", b"BOTH", "crash", 3),
    ],
)
def test_what_ends_a_probe_costs_that_input_alone(tmp_path, traps, name, word, kind, attempts):
    for seed, good in enumerate(("a.png", "c.png")):
        (tmp_path / good).write_bytes(encode_image(picture(seed=seed), "PNG"))
    (tmp_path / name).write_bytes(b"when probed " + word)
    assets = list_assets(open_store(str(tmp_path))).assets
    limits = DecodeLimits(deadline_s=deadline_s(word), memory_bytes=512 << 20)
    with DecodeWorker(limits) as worker:
        probes = worker.probe_assets(str(tmp_path), assets)
    assert [probe.error_kind for probe in probes] == [None, kind, None]
    assert tries(traps, word) == attempts <= 3
    (part,) = slice_asset(probes[1])
    assert (part.frame_index, part.error_kind) == ((-1,), kind)
    print(f"PROOF {kind} while probing {name}: {attempts} attempts, that input alone")


def shard_with(folder, word):
    """A shard of four pictures, of which the second one holds a word."""
    folder.mkdir(exist_ok=True)
    parts = []
    for seed, name in enumerate(("a.png", "b.png", "c.png", "d.png")):
        data = encode_image(picture(seed=seed), "PNG") + (word if name == "b.png" else b"")
        (folder / name).write_bytes(data)
        parts.append(
            Slice(asset=name, kind="image", size_bytes=len(data), etag="", width=96, height=64)
        )
    return ShardSpec(
        shard_id=0, root=str(folder), input_width_px=64, input_height_px=32, slices=tuple(parts)
    )


@pytest.mark.parametrize(
    ("word", "kind", "attempts"),
    [(b"SEGV", "crash", 3), (b"HANG", "timeout", 2), (b"BOTH", "crash", 3)],
)
def test_what_ends_a_decode_is_tried_three_times_at_most(tmp_path, traps, word, kind, attempts):
    shard = shard_with(tmp_path, b"when decoded " + word)
    with DecodeWorker(DecodeLimits(deadline_s=deadline_s(word))) as worker:
        decoded = worker.decode_shard(shard)
    assert [frame.error_kind for frame in decoded.frames] == [None, kind, None, None]
    assert tries(traps, word) == attempts <= 3
    for got, seed in zip(decoded.pixels, (0, 2, 3), strict=True):
        assert np.array_equal(got, resize(picture(seed=seed), SIZE))
    print(f"PROOF {kind} while decoding: {attempts} attempts, that input alone")


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "job"), create=True)


def stage(store, lease):
    return DecodeShard(stage_context(store, lease))


def test_deaths_at_an_input_are_counted_over_all_drivers(tmp_path, traps, store, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    table = shards_to_table([shard_with(tmp_path / "archive", b"when decoded SEGV")])
    # Of two drivers that were killed at the attempt after that; and at other inputs.
    for lease, shard_id, place in ((1, 0, 1), (2, 0, 1), (1, 0, 2), (1, 0, 2), (1, 1, 1)):
        DecodeTally(store=store, generation=Generation(), lease=lease, shard_id=shard_id)(
            place, "crash"
        )
    # A thread's own decoder starts with the traps; this one's may be older than they are.
    with ThreadPoolExecutor(1) as pool:
        decoded = DecodedShard.from_table(pool.submit(stage(store, lease=3), table).result())
    assert [frame.error_kind for frame in decoded.frames] == [None, "crash", None, None]
    assert tries(traps, b"SEGV") == 1
    # The model has nothing to do with that.
    assert Journal(store, Generation(), 3).deaths(0) == Deaths()


def test_hangs_at_an_input_are_counted_over_all_drivers(store):
    tally = DecodeTally(store=store, generation=Generation(), lease=1, shard_id=0)
    assert tally(1, "timeout") == {"timeout": 1}
    assert tally(2, "timeout") == {"timeout": 1}
    assert tally(1, "crash") == {"timeout": 1, "crash": 1}
    later = DecodeTally(store=store, generation=Generation(), lease=2, shard_id=0)
    assert later(1, "timeout") == {"timeout": 2, "crash": 1}


def test_a_shard_without_deaths_costs_no_request(tmp_path, store, monkeypatch):
    shard = shard_with(tmp_path / "archive", b"")

    def refuse(*_, **__):
        raise AssertionError

    for name in ("put", "create", "list"):
        monkeypatch.setattr(LocalStore, name, refuse)
    decoded = DecodedShard.from_table(stage(store, lease=1)(shards_to_table([shard])))
    assert [frame.error_kind for frame in decoded.frames] == [None] * 4


def test_a_signal_to_the_whole_group_is_no_death_of_an_input(tmp_path):
    shard = shard_with(tmp_path, b"")
    with DecodeWorker() as worker:
        worker.decode_shard(shard)
        pid = worker.pid
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        worker.decode_shard(shard)
        assert worker.pid == pid
