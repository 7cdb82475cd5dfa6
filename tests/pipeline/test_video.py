"""Timelines and frames of real videos, in this process."""

import shutil
import struct
from fractions import Fraction

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.geometry import Orientation
from pipeline.records import Asset
from pipeline.sources.assets import DecodeLimits
from pipeline.sources.slicing import Sampling, slice_asset
from pipeline.sources.video import probe_video
from pipeline.sources.video_frames import read_frames
from tests.media import damage, packet_places, read_sequentially, scene, write_video

LIMITS = DecodeLimits()


def probe(path, limits=LIMITS):
    asset = Asset(path=path.name, kind="video", size_bytes=path.stat().st_size, etag="")
    with path.open("rb") as file:
        return probe_video(file, asset, limits, lambda: None)


def read(path, part, limits=LIMITS):
    """Frames and errors of a slice, by frame index."""
    frames, errors = {}, {}
    with path.open("rb") as file:
        for outcome in read_frames(
            file,
            part.pts,
            part.seek_pts,
            (part.width, part.height),
            limits,
            lambda: None,
            ranks=part.frame_index,
        ):
            index = part.frame_index[outcome.position]
            assert index not in frames
            assert index not in errors
            if outcome.pixels is None:
                errors[index] = outcome.error_kind
            else:
                frames[index] = outcome.pixels
    assert len(frames) + len(errors) == len(part.frame_index)
    return frames, errors


def read_sliced(path, target_frames, sampling=None):
    frames, errors = {}, {}
    for part in slice_asset(probe(path), sampling=sampling, target_frames=target_frames):
        if part.error_kind is not None:
            errors |= dict.fromkeys(part.frame_index, part.error_kind)
            continue
        more_frames, more_errors = read(path, part)
        frames |= more_frames
        errors |= more_errors
    return frames, errors


UNEVEN = np.cumsum(np.random.default_rng(0).integers(1, 9, 40)).tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h264.mp4", {}),
        ("h264.mov", {"gop": 2, "b_frames": 1}),
        ("h264.mkv", {}),
        ("h264.ts", {}),
        ("h264.avi", {}),
        ("intra.mp4", {"gop": 1, "b_frames": 0}),
        ("h265.mp4", {"codec": "libx265"}),
        ("h265.mkv", {"codec": "libx265"}),
        ("h265.ts", {"codec": "libx265"}),
        ("open.mp4", {"x264_params": "open-gop=1"}),
        ("open.ts", {"x264_params": "open-gop=1"}),
        ("open265.mp4", {"codec": "libx265", "x264_params": "open-gop=1"}),
        ("refresh.ts", {"gop": 100, "x264_params": "intra-refresh=1"}),
        ("uneven.mp4", {"ticks": UNEVEN}),
        ("uneven.mkv", {"ticks": UNEVEN}),
        ("uneven.ts", {"ticks": UNEVEN}),
        ("deep.mp4", {"codec": "libx265", "pix_fmt": "yuv420p10le"}),
        ("odd.mkv", {"size": (98, 66), "pix_fmt": "yuv444p"}),
        ("mjpeg.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p"}),
        ("sound.mp4", {"audio_s": 2.0}),
        ("late.mp4", {"ticks": range(1000, 1040)}),
    ],
)
def test_slices_give_what_a_plain_decode_gives(tmp_path, name, options):
    path = write_video(tmp_path / name, **options)
    expected = [pixels for _, pixels in read_sequentially(path)]
    assert len(expected) == 40
    for target_frames in (4, 15, 100):
        frames, errors = read_sliced(path, target_frames)
        assert not errors
        assert sorted(frames) == list(range(40))
        assert all(np.array_equal(frames[index], expected[index]) for index in frames)
    print(f"PROOF {name}: {len(expected)} frames as of a plain decode")


def test_sampled_frames_are_the_right_ones(tmp_path):
    path = write_video(tmp_path / "a.mp4", ticks=UNEVEN)
    expected = [pixels for _, pixels in read_sequentially(path)]
    frames, errors = read_sliced(path, 3, Sampling(frames_per_second=3.0))
    assert not errors
    assert 0 < len(frames) < 40
    assert all(np.array_equal(frames[index], expected[index]) for index in frames)


def test_long_transport_stream_seeks(tmp_path):
    path = write_video(tmp_path / "a.ts", num_frames=400, gop=40)
    expected = [pixels for _, pixels in read_sequentially(path)]
    frames, errors = read_sliced(path, 30)
    assert not errors
    assert all(np.array_equal(frames[index], expected[index]) for index in range(400))


def test_timeline(tmp_path):
    found = probe(write_video(tmp_path / "a.mp4", ticks_per_second=10))
    assert (found.width, found.height, found.rotation_deg) == (96, 64, 0)
    assert [tick * found.time_base for tick in found.pts] == [Fraction(i, 10) for i in range(40)]
    assert [found.pts.index(tick) for tick in found.keyframe_pts] == [0, 10, 20, 30]
    assert found.duration_s == pytest.approx(4.0)
    assert found.promised_frames == 40
    assert found.num_missing == 0


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_rotation_is_applied(tmp_path, degrees):
    path = write_video(tmp_path / "a.mp4", rotation_deg=degrees, num_frames=12)
    found = probe(path)
    assert found.rotation_deg == degrees % 360
    frames, errors = read_sliced(path, 5)
    assert not errors
    for index, (_, stored) in enumerate(read_sequentially(path)):
        assert np.array_equal(frames[index], np.rot90(stored, degrees // 90))
        assert frames[index].shape == (found.height, found.width, 3)
    # FFmpeg's own word for it, against the picture that went in.
    turned = np.rot90(scene(12)[0], degrees // 90).astype(int)
    assert np.abs(frames[0].astype(int) - turned).mean() < 12


def put_matrix(path, a, b, c, d):
    """Write a display matrix into the only track of an MP4 (ISO/IEC 14496-12, 8.3.2)."""
    data = bytearray(path.read_bytes())
    box = data.index(b"tkhd") + 4
    assert data[box] == 0
    place = box + 40
    values = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    data[place : place + 36] = struct.pack(">9i", *values)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "matrix",
    [
        *((1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1)),
        *((0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0)),
    ],
)
def test_mirrored_and_turned_pictures_are_put_upright(tmp_path, matrix):
    path = write_video(tmp_path / "a.mp4", num_frames=3)
    put_matrix(path, *matrix)
    frames, errors = read_sliced(path, 3)
    assert not errors
    stored = next(iter(read_sequentially(path)))[1]
    a, b, c, d = matrix
    q, p = np.indices(stored.shape[:2])
    x, y = a * p + c * q, b * p + d * q
    upright = np.empty((np.ptp(y) + 1, np.ptp(x) + 1, 3), np.uint8)
    upright[y - y.min(), x - x.min()] = stored
    assert np.array_equal(frames[0], upright)


def test_cut_with_the_index_in_front_misses_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4", container_options={"movflags": "faststart"})
    expected = dict(read_sequentially(path))
    places = packet_places(path)
    cut = places[25][1] + 5
    path.write_bytes(path.read_bytes()[:cut])
    found = probe(path)
    assert found.promised_frames == 40
    assert found.num_missing == 40 - len(found.pts) > 0
    frames, errors = read_sliced(path, 8)
    assert sorted(frames | errors) == list(range(40))
    assert set(errors.values()) <= {"count_mismatch", "corrupt", "truncated"}
    assert len(frames) >= 20
    # By time: the rank of the last ones shifts where a frame between them was cut off.
    assert all(np.array_equal(frames[i], expected[found.pts[i]]) for i in frames)


@pytest.mark.parametrize(
    ("name", "fraction", "kind"),
    [("a.mp4", 0.5, "truncated"), ("a.mp4", 0.0, "truncated"), ("a.mkv", 0.0, "truncated")],
)
def test_cut_beyond_use(tmp_path, name, fraction, kind):
    path = write_video(tmp_path / name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(InputError) as caught:
        probe(path)
    assert caught.value.kind == kind


def test_cut_matroska_says_so_in_one_entry(tmp_path):
    path = write_video(tmp_path / "a.mkv", num_frames=90)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = probe(path)
    assert 10 < len(found.pts) < 80
    assert (found.num_missing, found.missing_kind) == (1, "truncated")


def test_cut_transport_stream_is_shorter(tmp_path):
    path = write_video(tmp_path / "a.ts", num_frames=90)
    expected = [pixels for _, pixels in read_sequentially(path)]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames, errors = read_sliced(path, 20)
    assert len(frames) > 20
    assert len(errors) <= 1
    # A transport stream does not say how long its last picture is: if the entropy coder takes what
    # is left of it, nothing shows that it was cut.
    whole = set(frames) - {max(frames)}
    assert all(np.array_equal(frames[index], expected[index]) for index in whole)


def test_edit_lists_leave_frames_out_on_purpose(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", gop=10)
    path = tmp_path / "trimmed.mp4"
    trim(whole, path, first_tick=15 * 512)
    found = probe(path)
    assert found.promised_frames == 40
    assert len(found.pts) == 25
    assert found.num_missing == 0
    frames, errors = read_sliced(path, 6)
    assert not errors
    expected = [pixels for _, pixels in read_sequentially(whole)][15:]
    assert all(np.array_equal(frames[index], expected[index]) for index in range(25))


def test_an_edit_list_that_leaves_every_frame_out_is_corrupt(tmp_path):
    path = tmp_path / "trimmed.mp4"
    trim(write_video(tmp_path / "whole.mp4"), path, first_tick=1 << 30)
    with pytest.raises(InputError, match="leaves every frame out") as caught:
        probe(path)
    assert caught.value.kind == "corrupt"


def trim(source, target, first_tick):
    """Move the start of the only edit list entry forward by media ticks."""
    data = bytearray(source.read_bytes())
    place = data.index(b"elst") + 4
    assert data[place] == 0  # version 0: duration, media time, rate
    media_time = int.from_bytes(data[place + 12 : place + 16])
    data[place + 12 : place + 16] = (media_time + first_tick).to_bytes(4)
    target.write_bytes(bytes(data))


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_damage_is_told_and_other_frames_are_exact(tmp_path, codec):
    path = write_video(tmp_path / "a.mp4", codec=codec, size=(320, 192))
    expected = [pixels for _, pixels in read_sequentially(path)]
    # The header of a P frame's slice in the second group of pictures.
    _, offset, size, is_keyframe = packet_places(path)[13]
    assert not is_keyframe
    damage(path, offset + 5, size - 5)
    frames, errors = read_sliced(path, 7)
    assert sorted(frames | errors) == list(range(40))
    assert errors
    assert set(errors.values()) <= {"corrupt", "count_mismatch"}
    assert all(10 <= index < 20 for index in errors)
    assert all(np.array_equal(frames[index], expected[index]) for index in frames)


def test_frames_that_vanished_since_planning_are_truncated(tmp_path):
    path = write_video(tmp_path / "a.ts")
    expected = [pixels for _, pixels in read_sequentially(path)]
    (part,) = slice_asset(probe(path), target_frames=100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames, errors = read(path, part)
    assert len(frames) > 10
    assert len(errors) > 10
    assert set(errors.values()) <= {"truncated", "corrupt"}
    assert all(np.array_equal(frames[index], expected[index]) for index in frames)


def test_a_time_stamp_that_is_not_there_is_a_count_mismatch(tmp_path):
    path = write_video(tmp_path / "a.mp4", num_frames=12)
    (part,) = slice_asset(probe(path))
    with path.open("rb") as file:
        outcomes = list(
            read_frames(file, (0, 1, 512), part.seek_pts, (96, 64), LIMITS, lambda: None)
        )
    assert {o.position: o.error_kind for o in outcomes} == {0: None, 1: "count_mismatch", 2: None}


def test_a_frame_of_another_size_is_unsupported(tmp_path):
    path = write_video(tmp_path / "a.mp4", num_frames=5)
    with path.open("rb") as file:
        (outcome,) = read_frames(file, (0,), 0, (640, 480), LIMITS, lambda: None)
    assert outcome.error_kind == "unsupported"


def test_too_large(tmp_path):
    path = write_video(tmp_path / "a.mp4", num_frames=3)
    with pytest.raises(InputError) as caught:
        probe(path, DecodeLimits(max_pixels=96 * 64 - 1))
    assert caught.value.kind == "too_large"


def write_growing(path, codec):
    """A stream whose last ten pictures are four times as large as its first ten."""
    for first, size in ((0, (96, 64)), (10, (192, 128))):
        ticks = [300 * (first + index) for index in range(10)]
        options = {"codec": codec, "b_frames": 0, "ticks": ticks, "ticks_per_second": 9000}
        part = write_video(path.with_name("part.ts"), num_frames=10, size=size, **options)
        with path.open("ab") as file:
            file.write(part.read_bytes())
    return path


def test_a_picture_that_grows_beyond_the_cap_is_refused_by_the_decoder(tmp_path):
    """One at the cap is not, though its buffer is larger."""
    path = write_growing(tmp_path / "grows.ts", "libx264")
    for max_pixels, kind in ((96 * 64, "corrupt"), (192 * 128, "unsupported")):
        limits = DecodeLimits(max_pixels=max_pixels)
        (part,) = slice_asset(probe(path, limits), target_frames=64)
        frames, errors = read(path, part, limits)
        # The last two are gone with what the decoder held when the size changed.
        assert set(frames) == set(range(8))
        assert {errors[index] for index in range(10, 20)} == {kind}


def test_a_decoder_without_memory_is_no_end_of_the_video(tmp_path):
    """What FFmpeg's decoder of H.265 says of a picture beyond the cap."""
    path = write_growing(tmp_path / "grows.ts", "libx265")
    limits = DecodeLimits(max_pixels=96 * 64)
    (part,) = slice_asset(probe(path, limits), target_frames=64)
    with pytest.raises(MemoryError):
        read(path, part, limits)


def test_playlists_are_not_followed(tmp_path):
    secret = write_video(tmp_path / "secret.ts", num_frames=5)
    playlist = tmp_path / "a.ts"
    playlist.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n"
    )
    with pytest.raises(InputError) as caught:
        probe(playlist)
    assert caught.value.kind == "unsupported"


@pytest.mark.parametrize("content", [b"x" * 5000, bytes(5000), b"<html>404</html>" * 99])
def test_what_is_no_video_is_corrupt(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        probe(path)
    assert caught.value.kind == "corrupt"


def test_sound_alone_is_unsupported(tmp_path):
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError) as caught:
        probe(path)
    assert caught.value.kind == "unsupported"


def test_orientation_comes_from_the_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4", rotation_deg=90, num_frames=2)
    found = probe(path)
    assert (found.width, found.height) == Orientation(transpose=True).size(96, 64)
    moved = tmp_path / "b.mp4"
    shutil.copy(path, moved)
    assert probe(moved).pts == found.pts
