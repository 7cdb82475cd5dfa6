"""Two and sixteen drivers at one job at the same time: real processes, but no Ray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.lease import heartbeats
from jobs.verify import verify_job
from pipeline.storage import StorageOptions
from tests.jobs.job_parts import make_job, where

TIMEOUT_S = 240


@pytest.mark.parametrize(
    ("job_url", "number", "num_shards"),
    [("local", 2, 20), ("local", 16, 20), ("S3", 2, 8)],
    indirect=["job_url"],
)
def test_drivers_share_a_job(
    job_url: str, tmp_path: Path, project_root: Path, number: int, num_shards: int
) -> None:
    job = make_job(tmp_path, url=job_url, num_images=num_shards - 1, frames=1)
    assert job.plan.num_shards == num_shards
    done = subprocess.run(
        [sys.executable, "-m", "tests.jobs.drivers_without_ray", job.store.url, str(number)],
        cwd=project_root,
        env=os.environ | {"PYTHONPATH": str(project_root)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["outcome"] for result in results] == ["quarantined"] * number
    assert {result["num_done"] for result in results} == {num_shards}
    computed = [result["num_computed"] for result in results]
    assert sum(computed) == num_shards
    beats = heartbeats(job.store)
    assert [beat.lease for beat in beats] == list(range(1, number + 1))
    assert {beat.state for beat in beats} == {"ended"}
    assert len({beat.pid for beat in beats}) == number
    findings = verify_job(job.store.url, StorageOptions())
    assert findings.is_complete, findings.text()
    assert findings.orphans == []
    num_working = sum(count > 0 for count in computed)
    assert num_working > 1
    print(
        f"PROOF {number} drivers {where(job_url)}: {num_shards} shards decided once each, "
        f"by {num_working} of them, verify: {findings.text().splitlines()[1]}"
    )
