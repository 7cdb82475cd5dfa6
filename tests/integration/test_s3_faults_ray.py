"""The real command line over real Ray and an S3 that fails in a fifth of all requests."""

from pathlib import Path
from uuid import uuid4

import pytest

from pipeline.storage import open_store
from tests.fault_proxy import FAULTS, run_fault_proxy
from tests.integration.jobs_under_test import (
    STAGED,
    JobUnderTest,
    add_bad_inputs,
    make_archive,
    make_weights,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

EXIT_FAILED, EXIT_QUARANTINED = 1, 3
SEED = 20261128
SHARE = 0.2
MOST_STOPS = 6


def test_a_job_ends_right_or_stops_and_says_why(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_archive(tmp_path / "archive", num_frames=20, num_stills=8)
    add_bad_inputs(folder)
    root = f"s3://frames/{uuid4().hex}"
    store = open_store(root)
    for path in folder.iterdir():
        store.put(path.name, path.read_bytes())
    undisturbed = _job(root, tmp_path)
    with undisturbed.nothing_left():
        driver = undisturbed.run()
        assert driver.end() == EXIT_QUARANTINED, driver.said
        rows, pngs = undisturbed.rows(), undisturbed.pngs()

    job = _job(root, tmp_path)
    stops = []
    with run_fault_proxy(s3_server, too_slow_s=2.0) as proxy, job.nothing_left():
        proxy.arm([kind for kind in FAULTS if kind != "expired"], SHARE, SEED)
        while True:
            kept = job.commits()
            with monkeypatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", proxy.url)
                driver = job.run()
            code = driver.end(600)
            now = job.commits()
            assert {key: now.get(key) for key in kept} == kept
            if code == EXIT_QUARANTINED:
                break
            assert code == EXIT_FAILED, driver.said
            assert "Traceback" not in driver.said, driver.said
            stops.append(driver.said.strip().splitlines()[-1])
            assert stops[-1].startswith("segformer3d: "), driver.said
            assert len(stops) <= MOST_STOPS, stops
        injected, num_requests = proxy.injected, proxy.num_requests
    job.check_sound()
    assert job.rows() == rows
    assert job.pngs() == pngs
    print(
        f"PROOF S3 faults under Ray: {injected.total()} of {num_requests} requests of "
        f"{len(injected)} kinds, {len(stops)} stops resumed, final set right"
    )
    for line in stops:
        print(f"  {line}")


def _job(root: str, folder: Path) -> JobUnderTest:
    return JobUnderTest(
        archive=root,
        url=f"s3://out/{uuid4().hex}",
        weights=make_weights(folder / "weights.safetensors"),
        folder=folder / "said",
        settings=(*STAGED, "output.png=true"),
    )
