"""A canary through a whole run with Ray: not in its output, its objects, or Ray's own logs."""

import sys

import pytest

from pipeline.storage import open_store
from tests.integration.jobs_under_test import (
    JobUnderTest,
    add_bad_inputs,
    make_archive,
    make_weights,
    ray_folder,
)
from tests.s3_server import ACCESS_KEY_ID, SECRET_ACCESS_KEY
from tests.secrets_scan import files_below, leaks, objects_in

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(sys.platform != "linux", reason="reads Ray's session folder"),
]
CANARY = "canary-77ab02-never-written"
SECRETS = (ACCESS_KEY_ID, SECRET_ACCESS_KEY, CANARY)


def test_no_secret_stands_in_anything_that_a_run_leaves(s3_bucket_url, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    archive = make_archive(tmp_path / "archive", num_frames=10, num_stills=6)
    add_bad_inputs(archive)
    store = open_store(s3_bucket_url)
    for path in archive.iterdir():
        store.put(f"in/{path.name}", path.read_bytes())
    job = JobUnderTest(
        archive=f"{s3_bucket_url}/in",
        url=f"{s3_bucket_url}/job",
        weights=make_weights(tmp_path / "tiny.safetensors"),
        folder=tmp_path / "said",
    )
    with job.nothing_left():
        driver = job.run("--set", "output.png=true")
        assert driver.end(540) == 3, driver.said
        logs = list(files_below(ray_folder(job.folder)))
        said = list(files_below(job.folder))
    objects = list(objects_in(store))
    assert any("/logs/" in name and data for name, data in logs)
    # A lean Ray's agent is content: it would say so every second.
    assert not any(b"Get dashboard http address failed" in data for _, data in logs)
    assert any(name.endswith(".parquet") for name, _ in objects)
    assert "Traceback" not in driver.said
    assert leaks(iter(logs + said + objects), SECRETS) == []
    counts = f"{len(logs)} files of Ray's session, {len(objects)} objects"
    print(f"PROOF canary under Ray: {counts}, 0 leaks")
