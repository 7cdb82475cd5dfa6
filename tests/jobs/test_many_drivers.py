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
from tests.jobs.job_parts import make_job

NUM_SHARDS = 20
TIMEOUT_S = 240


@pytest.mark.parametrize("number", [2, 16])
def test_drivers_share_a_job(tmp_path: Path, project_root: Path, number: int) -> None:
    job = make_job(tmp_path, num_images=NUM_SHARDS - 1, frames=1)
    assert job.plan.num_shards == NUM_SHARDS
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
    assert {result["num_done"] for result in results} == {NUM_SHARDS}
    computed = [result["num_computed"] for result in results]
    assert sum(computed) == NUM_SHARDS
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
        f"PROOF {number} drivers: {NUM_SHARDS} shards decided once each, by {num_working} of them, "
        f"verify: {findings.text().splitlines()[1]}"
    )
