"""Memory of a whole run, driver, Ray's daemons and workers together, by the archive's length.

Makes archives of small JPEGs, runs ``segformer3d run`` on each with two CPUs, and samples the
proportional set size of every process of the run; shared memory, the object store in it, is
counted once.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

SAMPLE_S = 0.5
NUM_DISTINCT = 50
SIZE = (640, 360)
NUM_TENTHS = 10
TINY = "mit:16,32,80,128:1,2,2,1"
MIB = 2**20
_MARK = "SEGFORMER3D_BENCHMARK_RUN"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The run's memory at one moment, in bytes.

    Attributes:
        at_s: Seconds from the start.
        total: All of it.
        driver: The driver's own part.
        shared: Shared memory, which is the object store but for shards in the decoders.
        spilled: What Ray has put on disk for want of room in the object store.
        num_processes: How many processes there are.
    """

    at_s: float
    total: int
    driver: int
    shared: int
    spilled: int
    num_processes: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run.

    Attributes:
        num_images: Length of the archive.
        short_side_px: Short side of the model's input.
        decoded_mib: Pixels that went through the object store.
        object_store_mib: Its size.
        wall_s: How long the run took.
        peak_mib: Most memory at a time.
        peak_driver_mib: Most memory of the driver alone.
        peak_shared_mib: Most shared memory.
        spilled_mib: What was on disk for want of room, at the most.
        tenths_mib: Peak in each tenth of the run's time.
        driver_tenths_mib: The driver's peak, likewise.
        shared_tenths_mib: The peak of shared memory, likewise.
    """

    num_images: int
    short_side_px: int
    decoded_mib: int
    object_store_mib: int
    wall_s: float
    peak_mib: int
    peak_driver_mib: int
    peak_shared_mib: int
    spilled_mib: int
    tenths_mib: tuple[int, ...]
    driver_tenths_mib: tuple[int, ...]
    shared_tenths_mib: tuple[int, ...]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--images", type=int, nargs="+", default=[500, 5000], help="lengths of the archives"
    )
    parser.add_argument("--short-side", type=int, default=256, help="of the model's input, in px")
    parser.add_argument("--object-store-mib", type=int, default=1024)
    parser.add_argument(
        "--bundled",
        action="store_true",
        help="with the MiT-B0 in the box instead of a tiny network",
    )
    parser.add_argument("--graph", choices=("staged", "fused"), default="staged")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args()
    measured = []
    for count in given.images:
        measured.append(
            measure(
                count,
                short_side_px=given.short_side,
                object_store_mib=given.object_store_mib,
                tiny=not given.bundled,
                graph=given.graph,
            )
        )
        print(measured[-1], file=sys.stderr, flush=True)
    if given.json:
        print(json.dumps([asdict(item) for item in measured], indent=2))
    else:
        print("\n".join(table(measured)))


def measure(
    num_images: int, *, short_side_px: int, object_store_mib: int, tiny: bool, graph: str
) -> Measurement:
    """Run one archive and watch it."""
    with tempfile.TemporaryDirectory(prefix="memory-") as name:
        folder = Path(name)
        make_archive(folder / "archive", num_images)
        if tiny:
            make_weights(folder / "weights.safetensors")
        mark, started = uuid.uuid4().hex, time.monotonic()
        with (folder / "said").open("wb") as said:
            driver = subprocess.Popen(
                _command(folder, short_side_px, object_store_mib, graph),
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=os.environ | {_MARK: mark, "RAY_TMPDIR": name},
            )
        with Watch(mark, driver.pid, folder, started) as watch:
            code = driver.wait()
        wall_s = time.monotonic() - started
        if code != 0:
            raise SystemExit(f"the run ended with {code}: {(folder / 'said').read_text()}")
        plan = json.loads((folder / "out/gen-0000/plan/plan.json").read_text())
    samples = watch.samples
    return Measurement(
        num_images=num_images,
        short_side_px=short_side_px,
        decoded_mib=3 * plan["num_pixels"] // MIB,
        object_store_mib=object_store_mib,
        wall_s=round(wall_s, 1),
        peak_mib=max(item.total for item in samples) // MIB,
        peak_driver_mib=max(item.driver for item in samples) // MIB,
        peak_shared_mib=max(item.shared for item in samples) // MIB,
        spilled_mib=max(item.spilled for item in samples) // MIB,
        tenths_mib=tenths([(item.at_s, item.total) for item in samples], wall_s),
        driver_tenths_mib=tenths([(item.at_s, item.driver) for item in samples], wall_s),
        shared_tenths_mib=tenths([(item.at_s, item.shared) for item in samples], wall_s),
    )


def make_archive(folder: Path, num_images: int) -> None:
    """``num_images`` names for a few distinct pictures."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(num_images):
        path = folder / f"{index // 1000:03}" / f"{index:06}.jpg"
        path.parent.mkdir(exist_ok=True)
        if index < NUM_DISTINCT:
            coarse = rng.integers(0, 256, (9, 16, 3), np.uint8)
            smooth = cv2.resize(coarse, SIZE, interpolation=cv2.INTER_CUBIC)
            _, data = cv2.imencode(".jpg", smooth)
            path.write_bytes(data.tobytes())
        else:
            path.hardlink_to(folder / "000" / f"{index % NUM_DISTINCT:06}.jpg")


def make_weights(path: Path) -> None:
    """Tiny untrained weights: what flows around the model is measured, not the model."""
    from segformer3d.weights import untrained_weights

    path.write_bytes(untrained_weights(TINY))


def _command(folder: Path, short_side_px: int, object_store_mib: int, graph: str) -> list[str]:
    settings = {
        "ray.graph": graph,
        "geometry.short_side_px": short_side_px,
        "ray.num_cpus": 2,
        "ray.object_store_bytes": object_store_mib * MIB,
    }
    command = [sys.executable, "-m", "jobs.cli", "run", "--input", str(folder / "archive")]
    command += ["--output", str(folder / "out")]
    weights = folder / "weights.safetensors"
    command += ["--weights", str(weights)] if weights.exists() else []
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    return command


class Watch:
    """Samples the memory of all processes that carry a mark, until closed.

    Args:
        mark: What they carry in their environment.
        driver: The driver's process id.
        folder: Where Ray spills.
        started: When the run started.
    """

    def __init__(self, mark: str, driver: int, folder: Path, started: float) -> None:
        self.samples: list[Sample] = []
        self._mark = f"{_MARK}={mark}".encode()
        self._driver, self._folder, self._started = driver, folder, started
        self._ours: dict[int, bool] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.samples.append(self._sample())

    def _sample(self) -> Sample:
        at_s = time.monotonic() - self._started
        own = driver = shared_pss = num_processes = 0
        files: dict[tuple[int, int], int] = {}
        for pid in self._processes():
            try:
                pss = _pss(pid)
                files.update(_shared_files(pid))
            except (OSError, ValueError):
                continue
            num_processes += 1
            own += pss["Pss"] - pss["Pss_Shmem"]
            shared_pss += pss["Pss_Shmem"]
            if pid == self._driver:
                driver = pss["Pss"]
        # Pages of the store that no process has mapped just now are in its file all the same, and
        # memory whose file is closed is in the processes' shares.
        shared = max(shared_pss, sum(files.values()))
        return Sample(
            at_s=at_s,
            total=own + shared,
            driver=driver,
            shared=shared,
            spilled=_folder_bytes(self._folder / "ray"),
            num_processes=num_processes,
        )

    def _processes(self) -> Iterator[int]:
        alive = {int(name) for name in os.listdir("/proc") if name.isdigit()}  # noqa: PTH208
        self._ours = {pid: ours for pid, ours in self._ours.items() if pid in alive}
        for pid in alive:
            # A fork carries its parent's environment, so only what is not ours yet may become so.
            if not self._ours.get(pid):
                self._ours[pid] = self._is_marked(pid)
            if self._ours[pid]:
                yield pid

    def _is_marked(self, pid: int) -> bool:
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False


def _pss(pid: int) -> dict[str, int]:
    """Proportional set size of a process and its shared part, in bytes."""
    fields = {"Pss": 0, "Pss_Shmem": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        if name in fields:
            fields[name] = int(value.split()[0]) * 1024
    return fields


def _shared_files(pid: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Identity and allocated bytes of the shared memory files that a process holds."""
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):  # noqa: PTH208 - a Path for every descriptor costs too much
        try:
            target = os.readlink(f"{folder}/{name}")  # noqa: PTH115
            if target.startswith(("/dev/shm/", "/memfd:decoded")):  # noqa: S108  # nosec B108
                status = os.stat(f"{folder}/{name}")  # noqa: PTH116
                yield (status.st_dev, status.st_ino), status.st_blocks * 512
        except FileNotFoundError:
            continue


def _folder_bytes(folder: Path) -> int:
    """Size of what Ray spilled below its folder."""
    total = 0
    for path in folder.glob("session_*/ray_spilled_objects*/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def tenths(samples: Sequence[tuple[float, int]], wall_s: float) -> tuple[int, ...]:
    """The largest value in each tenth of the time, in MiB."""
    peaks = [0] * NUM_TENTHS
    for at_s, value in samples:
        place = min(NUM_TENTHS - 1, int(NUM_TENTHS * at_s / wall_s))
        peaks[place] = max(peaks[place], value)
    return tuple(peak // MIB for peak in peaks)


def table(measured: Sequence[Measurement]) -> Iterator[str]:
    """Markdown."""
    yield "| images | input px | decoded MiB | wall s | peak MiB | driver | shared | spilled |"
    yield "|---|---|---|---|---|---|---|---|"
    for item in measured:
        yield (
            f"| {item.num_images} | {item.short_side_px} | {item.decoded_mib} | {item.wall_s:.0f}"
            f" | {item.peak_mib} | {item.peak_driver_mib} | {item.peak_shared_mib}"
            f" | {item.spilled_mib} |"
        )
    yield ""
    yield f"| images, peak MiB by tenth | {' | '.join(map(str, range(1, NUM_TENTHS + 1)))} |"
    yield "|---" * (NUM_TENTHS + 1) + "|"
    for item in measured:
        for name, values in (
            ("all", item.tenths_mib),
            ("driver", item.driver_tenths_mib),
            ("shared", item.shared_tenths_mib),
        ):
            yield f"| {item.num_images} {name} | {' | '.join(map(str, values))} |"


if __name__ == "__main__":
    main()
