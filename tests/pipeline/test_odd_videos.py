"""Videos of odd time stamps, or of which parts are gone: never silently wrong or complete."""

import gzip
import struct
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.geometry import Orientation
from pipeline.records import Asset
from pipeline.sources import slicing
from pipeline.sources.assets import AssetProbe
from pipeline.sources.slicing import Sampling, slice_asset
from pipeline.sources.video_file import quiet_ffmpeg
from tests.media import (
    damage,
    encode_image,
    packet_places,
    picture,
    read_sequentially,
    scene,
    write_palette_video,
    write_video,
)
from tests.pipeline.image_parts import distance
from tests.pipeline.test_video import probe, read_sliced


def same(frames, expected):
    return all(np.array_equal(pixels, expected[index]) for index, pixels in frames.items())


def test_frames_of_one_time_stamp_are_told_apart(tmp_path):
    # Matroska counts milliseconds: ten frames of each.
    path = write_video(tmp_path / "fast.mkv", ticks_per_second=10_000)
    assert len(set(probe(path).pts)) < 10
    expected = [pixels for _, pixels in read_sequentially(path)]
    for target_frames in (3, 100):
        frames, errors = read_sliced(path, target_frames)
        assert (len(frames), errors) == (40, {})
        assert same(frames, expected)
    frames, errors = read_sliced(path, 3, Sampling(every_nth=3))
    assert (sorted(frames), errors) == (list(range(0, 40, 3)), {})
    assert same(frames, expected)


def test_recordings_put_behind_one_another_come_whole(tmp_path):
    parts = [
        write_video(tmp_path / "a.ts", num_frames=20, ticks=range(20)),
        write_video(tmp_path / "b.ts", num_frames=32, ticks=range(5, 37)),
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    # Where they meet, the counters of transport packets jump: that frame is given as damaged.
    whole = [pixels.tobytes() for part in parts for _, pixels in read_sequentially(part)]
    frames, errors = read_sliced(path, 8)
    assert len(frames) + len(errors) == 52
    assert len(errors) < 8
    assert {pixels.tobytes() for pixels in frames.values()} <= set(whole)
    assert sorted(frames | errors) == list(range(52))
    shown = [frames[index].tobytes() for index in sorted(frames)]
    of_second = set(whole[20:]) - set(whole[:20])
    assert len(of_second & set(shown)) >= len(of_second) - 8


def test_repeated_time_stamps_of_long_videos_are_said_and_not_read(monkeypatch):
    monkeypatch.setattr(slicing, "_MAX_READ_FRAMES", 100)
    found = AssetProbe(
        asset=Asset(path="a.ts", kind="video", size_bytes=1, etag=""),
        width=64,
        height=64,
        pts=(0, 1, 2, 2, 3, 3, *range(4, 60)),
        keyframe_pts=(0, 3),
        time_base=Fraction(1, 30),
    )
    parts = slice_asset(found, target_frames=2)
    failed = {index for part in parts if part.error_kind == "unsupported" for index in part.pts}
    assert failed == set()
    failed = {rank for part in parts if part.error_kind is not None for rank in part.frame_index}
    assert failed == {2, 3, 4, 5}
    assert sorted(rank for part in parts for rank in part.frame_index) == list(range(62))
    few = replace(found, pts=found.pts[:10])
    assert all(part.error_kind is None for part in slice_asset(few, target_frames=2))


@pytest.mark.parametrize(
    ("name", "codec", "changes"),
    [
        ("raw.mov", "rawvideo", False),
        ("smc.mov", "smc", False),
        ("raw.avi", "rawvideo", False),
        ("changing.avi", "rawvideo", True),
        ("msrle.avi", "msrle", True),
        ("zmbv.avi", "zmbv", True),
        ("png.mov", "png", True),
    ],
)
def test_a_palette_reaches_every_frame(tmp_path, name, codec, changes):
    path = write_palette_video(tmp_path / name, codec, changes=changes)
    expected = [pixels for _, pixels in read_sequentially(path)]
    assert min(pixels.mean() for pixels in expected) > 50
    frames, errors = read_sliced(path, 4)
    assert (len(frames), errors) == (12, {})
    assert same(frames, expected)
    has_own = codec in {"png", "zmbv"}
    assert {part.seek_pts is None for part in slice_asset(probe(path))} == {not has_own}


def test_a_palette_outlives_the_packet_that_it_came_with(tmp_path):
    path = write_palette_video(tmp_path / "a.mov", "smc")
    data = bytearray(path.read_bytes())
    # Its first picture is no longer among the keyframes, so nothing is decoded before the second.
    struct.pack_into(">4xIII", data, data.index(b"stss") + 4, 2, 5, 9)
    path.write_bytes(data)
    frames, errors = read_sliced(path, 4)
    assert (sorted(frames), len(errors)) == (list(range(4, 12)), 4)
    assert min(pixels.mean() for pixels in frames.values()) > 50


def test_the_palette_that_quicktime_means_by_grey_reaches_every_frame(tmp_path):
    path = write_video(tmp_path / "grey.mov", codec="qtrle", pix_fmt="gray", num_frames=12)
    expected = [pixels for _, pixels in read_sequentially(path)]
    frames, errors = read_sliced(path, 4)
    assert (len(frames), errors) == (12, {})
    assert same(frames, expected)


def test_long_videos_of_a_palette_are_said_and_not_read(monkeypatch, tmp_path):
    found = probe(write_palette_video(tmp_path / "a.mov", "rawvideo"))
    assert {part.seek_pts for part in slice_asset(found, target_frames=4)} == {None}
    monkeypatch.setattr(slicing, "_MAX_READ_FRAMES", 30)
    parts = slice_asset(found, target_frames=4)
    assert {part.error_kind for part in parts} == {"unsupported"}
    assert all("palette" in part.error for part in parts)
    assert sorted(rank for part in parts for rank in part.frame_index) == list(range(12))


def without_time(data, wanted):
    """A transport stream of which these PES packets have no time stamps (ISO/IEC 13818-1)."""
    data, number = bytearray(data), 0
    for start in range(0, len(data), 188):
        if not data[start + 1] & 0x40:
            continue
        head = start + 4 + (data[start + 4] + 1 if data[start + 3] & 0x20 else 0)
        if data[head : head + 3] != b"\0\0\1" or not 0xE0 <= data[head + 3] <= 0xEF:
            continue
        if wanted(number):
            data[head + 7] &= 0x3F
            length = data[head + 8]
            data[head + 9 : head + 9 + length] = b"\xff" * length
        number += 1
    return bytes(data)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_frames_without_time_stamps_are_counted_and_others_are_exact(tmp_path, codec):
    path = write_video(tmp_path / "a.ts", codec=codec, b_frames=0)
    expected = [pixels for _, pixels in read_sequentially(path)]
    whole = path.read_bytes()
    path.write_bytes(without_time(whole, lambda number: number % 3 == 1))
    frames, errors = read_sliced(path, 8)
    timed = [index for index in range(40) if index % 3 != 1]
    assert errors == dict.fromkeys(range(len(timed), 40), "unsupported")
    assert all(np.array_equal(frames[i], expected[index]) for i, index in enumerate(timed))
    path.write_bytes(without_time(whole, lambda _: True))
    with pytest.raises(InputError, match="no time stamps") as caught:
        probe(path)
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (Sampling(every_nth=4), [0, 4, 8, 10]),
        (Sampling(every_nth=1000), [0, 10]),
        (Sampling(frames_per_second=6.0), [0, 5, 10]),
    ],
)
def test_a_video_that_ends_early_says_so_however_it_is_sampled(sampling, expected):
    found = AssetProbe(
        asset=Asset(path="a.mkv", kind="video", size_bytes=1, etag=""),
        width=64,
        height=64,
        pts=tuple(range(10)),
        keyframe_pts=(0,),
        time_base=Fraction(1, 30),
        num_missing=1,
        missing_kind="truncated",
    )
    parts = slice_asset(found, sampling=sampling)
    assert [rank for part in parts for rank in part.frame_index] == expected
    assert parts[-1].error_kind == "truncated"


@pytest.mark.parametrize("where", [30, 62])
def test_a_cut_avi_misses_what_its_header_promises(tmp_path, where):
    path = write_video(tmp_path / "a.avi", num_frames=90, b_frames=0)
    with av.open(str(path)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    path.write_bytes(path.read_bytes()[: places[where] - 8])
    found = probe(path)
    assert (len(found.pts), found.num_missing) == (where, 90 - where)
    assert found.missing_kind == "count_mismatch"


def test_a_cut_of_less_than_a_second_is_seen(tmp_path):
    path = write_video(tmp_path / "short.mkv", num_frames=20)
    assert probe(path).num_missing == 0
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    found = probe(path)
    assert 0 < len(found.pts) < 20
    assert (found.num_missing, found.missing_kind) == (1, "truncated")


@pytest.mark.parametrize("inside", [False, True])
def test_a_lost_fragment_of_an_indexed_mp4_is_seen(tmp_path, inside):
    flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof+global_sidx"}
    path = write_video(tmp_path / "a.mp4", container_options=flags)
    assert (len(probe(path).pts), probe(path).num_missing) == (40, 0)
    data = path.read_bytes()
    cut = data.rindex(b"mdat") + 40 if inside else data.rindex(b"moof") - 4
    path.write_bytes(data[:cut])
    found = probe(path)
    assert 30 <= len(found.pts) < 40
    assert (found.num_missing, found.missing_kind) == (1, "truncated")


@pytest.mark.parametrize("name", ["closed.avi", "open.avi", "mpeg4.avi", "mpeg2.avi"])
def test_pictures_of_an_avi_stay_in_their_places(tmp_path, name):
    options = {
        "closed.avi": {"b_frames": 3},
        "open.avi": {"b_frames": 3, "x264_params": "open-gop=1"},
        "mpeg4.avi": {"codec": "mpeg4"},
        "mpeg2.avi": {"codec": "mpeg2video"},
    }[name]
    path = write_video(tmp_path / name, **options)
    expected = [pixels for _, pixels in read_sequentially(path)]
    for target_frames in (3, 8, 100):
        frames, errors = read_sliced(path, target_frames)
        assert (len(frames), errors) == (len(expected), {})
        assert same(frames, expected)
    print(f"PROOF {name}: {len(expected)} pictures in their places")


def without_slice(data, which):
    """An access unit of H.264 in MP4's form without one of its slices."""
    units, start = [], 0
    while start < len(data):
        end = start + 4 + struct.unpack_from(">I", data, start)[0]
        units.append(data[start:end])
        start = end
    slices = [index for index, unit in enumerate(units) if unit[4] & 31 in (1, 5)]
    assert len(slices) == 4
    del units[slices[which]]
    return b"".join(units)


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("which", [0, 3])
@pytest.mark.parametrize("place", [10, 14])
def test_what_refers_to_a_lost_slice_is_corrupt_too(tmp_path, place, which, b_frames):
    whole = write_video(tmp_path / "whole.mp4", b_frames=b_frames, x264_params="slices=4")
    expected = dict(read_sequentially(whole))
    path = tmp_path / "lost.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if not packet.size:
                continue
            data = bytes(packet)
            if number == place:
                data = without_slice(data, which)
            kept = av.Packet(data)
            kept.pts, kept.dts, kept.time_base = packet.pts, packet.dts, packet.time_base
            kept.is_keyframe, kept.stream = packet.is_keyframe, stream
            target.mux(kept)
    found = probe(path)
    for target_frames in (4, 100):
        frames, errors = read_sliced(path, target_frames)
        assert sorted(frames | errors) == list(range(40))
        assert set(errors.values()) == {"corrupt"}
        assert len(errors) <= 13
        assert all(np.array_equal(frames[i], expected[found.pts[i]]) for i in frames)
    print(f"PROOF slice {which} of frame {place} lost, {b_frames} B-frames: {len(errors)} corrupt")


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("name", ["a.mov", "a.avi"])
def test_pictures_of_a_video_may_have_exif(tmp_path, name, orientation):
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for index, pixels in enumerate(scene(4)):
            packet = av.Packet(encode_image(pixels, "JPEG", orientation=orientation))
            packet.stream, packet.pts, packet.dts = stream, index, index
            packet.time_base, packet.is_keyframe = Fraction(1, 10), True
            container.mux(packet)
    frames, errors = read_sliced(path, 2)
    assert (len(frames), errors) == (4, {})
    upright = [Orientation.from_exif(orientation).apply(pixels) for pixels in scene(4)]
    assert all(distance(frames[index], upright[index]) < 12 for index in frames)


@pytest.mark.parametrize("compression", ["raw", "lzw", "deflate", "packbits"])
def test_tiff_pictures_of_a_video(tmp_path, compression):
    quiet_ffmpeg()
    options = {"compression_algo": compression}
    path = write_video(
        tmp_path / "a.mov", codec="tiff", pix_fmt="rgb24", num_frames=6, codec_options=options
    )
    frames, errors = read_sliced(path, 2)
    assert errors == {}
    assert same(frames, scene(6))
    _, offset, size, _ = packet_places(path)[3]
    damage(path, offset + 8, size // 2)
    frames, errors = read_sliced(path, 2)
    assert same({index: frames[index] for index in frames if index != 3}, scene(6))
    # Of the others, what their coder accepts goes unseen.
    assert errors == {3: "corrupt"} if compression == "deflate" else set(errors) <= {3}


@pytest.mark.parametrize(
    ("data", "name"),
    [
        *((encode_image(picture(), name.upper()), name) for name in ("PNG", "JPEG", "GIF", "WebP")),
        (encode_image(picture(), "TIFF"), "TIFF"),
        (b"FLV\1" + bytes(600), "Flash"),
        (b"\0\0\1\xba" + bytes(600), "program stream"),
        (gzip.compress(bytes(100), mtime=0), "gzip"),
    ],
)
def test_what_is_no_video_says_what_it_is(tmp_path, data, name):
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        probe(path)
    assert caught.value.kind == "unsupported"
    assert name in caught.value.message


def test_what_a_decoder_does_not_do_is_unsupported(tmp_path):
    # As FFmpeg itself writes what QuickTime has no name for.
    path = write_video(tmp_path / "a.mov", codec="rawvideo", num_frames=3)
    with pytest.raises(InputError) as caught:
        probe(path)
    assert caught.value.kind == "unsupported"
    assert "rawvideo" in caught.value.message
