"""Records survive the trip through JSON where they are stored so."""

import json

import pytest

from pipeline.records import CommitRecord, DataFile

RECORD = CommitRecord(
    shard_id=5,
    plan_id="p",
    attempt="a" * 32,
    files=(DataFile(path="data/x.parquet", size_bytes=3, sha256="0f" * 32),),
    num_rows=2,
    num_ok=1,
    quarantined=(("ä\n.jpg", 0, "corrupt", "no image"),),
)


def test_commit_record_round_trip():
    assert CommitRecord.from_json(RECORD.to_json()) == RECORD


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[1]", b"null", b"\xff", b'{"files": 3}', b"[" * 100_000, b'{"a":' * 9999]
)
def test_malformed_commit_record(data):
    with pytest.raises(ValueError, match=r"^malformed commit record: [^\n]+$"):
        CommitRecord.from_json(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("plan_id", value) for value in (None, 5, 1.5, [], {}, float("nan"))),
        *(("num_rows", value) for value in ("2", 2.0, True, None, 1 << 63, 10**400)),
        *(("quarantined", [["a", value, "k", "r"]]) for value in (float("inf"), "0", None)),
        *(
            ("files", [{"path": "x", "size_bytes": 1, "sha256": value}])
            for value in ("", None, "0f")
        ),
        *(("files", value) for value in ([], [{}], [5], [{"path": "x", "size_bytes": 1}])),
        ("something", "new"),
    ],
)
def test_a_field_of_another_type_is_a_malformed_record(field, value):
    fields = json.loads(RECORD.to_json()) | {field: value}
    with pytest.raises(ValueError, match=r"^malformed commit record: [^\n]+$"):
        CommitRecord.from_json(json.dumps(fields).encode())
