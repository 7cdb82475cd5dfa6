"""Instants and places from real EXIF blocks and real containers."""

import io
from datetime import UTC, datetime

import av
import pytest
from PIL import ExifTags, Image

from jobs.planner import Planner
from jobs.spec import check_spec
from pipeline.decode import decode_shard, probe_asset
from pipeline.records import Asset
from pipeline.sinks.parquet import encode_shard, read_rows
from pipeline.sources.capture import Capture, capture_of_container, capture_of_image
from pipeline.stages import AnnotatedShard, Certainty
from tests.media import picture, write_video

NOON_US = int(datetime(2024, 5, 1, 12, tzinfo=UTC).timestamp() * 1e6)


def jpeg(*, offset="+02:00", gps=None, date="2024:05:01 14:00:00"):
    exif = Image.Exif()
    details = exif.get_ifd(ExifTags.IFD.Exif)
    details[ExifTags.Base.DateTimeOriginal] = date
    if offset:
        details[ExifTags.Base.OffsetTimeOriginal] = offset
    exif.get_ifd(ExifTags.IFD.GPSInfo).update(gps or {})
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def probe(tmp_path, data, name="a.jpg"):
    (tmp_path / name).write_bytes(data)
    asset = Asset(path=name, kind="image", size_bytes=len(data), etag="")
    return probe_asset(str(tmp_path), asset).capture


GPS = {
    ExifTags.GPS.GPSLatitudeRef: "S",
    ExifTags.GPS.GPSLatitude: (33.0, 51.0, 36.0),
    ExifTags.GPS.GPSLongitudeRef: "E",
    ExifTags.GPS.GPSLongitude: (151.0, 12.0, 0.0),
    ExifTags.GPS.GPSDateStamp: "2024:05:01",
    ExifTags.GPS.GPSTimeStamp: (12.0, 0.0, 0.0),
}


def test_exif_with_an_offset_and_a_place(tmp_path):
    found = probe(tmp_path, jpeg(gps=GPS))
    assert found.captured_at_us == NOON_US
    assert (found.latitude, found.longitude) == (pytest.approx(-33.86), pytest.approx(151.2))


def test_a_local_time_is_no_instant(tmp_path):
    assert probe(tmp_path, jpeg(offset=None)) == Capture()
    # GPS knows the instant where the camera's clock does not.
    assert probe(tmp_path, jpeg(offset=None, gps=GPS)).captured_at_us == NOON_US


@pytest.mark.parametrize("date", ["0000:00:00 00:00:00", "1980:01:01 00:00:00", "yesterday"])
def test_unset_clocks(tmp_path, date):
    assert probe(tmp_path, jpeg(date=date)).captured_at_us is None


@pytest.mark.parametrize(
    "gps",
    [
        {ExifTags.GPS.GPSLatitude: (91.0, 0.0, 0.0), ExifTags.GPS.GPSLongitude: (0.0, 0.0, 0.0)},
        {ExifTags.GPS.GPSLatitude: 3, ExifTags.GPS.GPSLongitude: "x"},
        {ExifTags.GPS.GPSLatitude: (float("nan"), 0, 0), ExifTags.GPS.GPSLongitude: (0, 0, 0)},
        {ExifTags.GPS.GPSLatitude: (1.0, 0.0, 0.0)},
    ],
)
def test_places_that_are_none(gps):
    assert capture_of_image({}, gps) == Capture()


def test_containers():
    found = capture_of_container(
        {"creation_time": "2024-05-01T12:00:00.000000Z", "location": "+37.7749-122.4194+010.0/"}
    )
    assert found == Capture(captured_at_us=NOON_US, latitude=37.7749, longitude=-122.4194)
    assert capture_of_container({"creation_time": "1904-01-01T00:00:00Z"}) == Capture()
    assert capture_of_container({"creation_time": "2024-05-01T12:00:00"}) == Capture()
    assert capture_of_container({"location": "+99.0+000.0/"}) == Capture()


def test_a_video_s_frames_are_captured_one_after_the_other(tmp_path):
    write_video(tmp_path / "plain.mp4", num_frames=4)
    with (
        av.open(str(tmp_path / "plain.mp4")) as source,
        av.open(str(tmp_path / "dated.mp4"), "w") as target,
    ):
        target.metadata["creation_time"] = "2024-05-01T12:00:00Z"
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    fields = {
        "input": {"url": str(tmp_path / "dated.mp4")},
        "output": {"url": str(tmp_path / "job")},
    }
    (shard,) = Planner(check_spec(fields, "the job")).shards()
    frames = decode_shard(shard).frames
    assert [frame.captured_at_us for frame in frames] == [
        NOON_US + round(frame.pts_s * 1e6) for frame in frames
    ]
    annotated = AnnotatedShard(
        shard_id=0, frames=frames, class_ids=None, depth=None, certainty=(Certainty(),) * 4
    )
    rows = read_rows(encode_shard(annotated, {}))
    assert rows[0]["captured_at"] == datetime(2024, 5, 1, 12, tzinfo=UTC)
