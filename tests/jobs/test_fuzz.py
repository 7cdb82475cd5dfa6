"""Thousands of mutated files through probing, slicing and decoding, as a job does it.

Reproducible by the seed.
"""

import gc
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePath

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.planner import Planner
from jobs.spec import JobSpec, check_spec
from pipeline import decode, decode_process
from pipeline.decode import decode_shard
from pipeline.errors import ERROR_KINDS
from pipeline.geometry import resize
from pipeline.records import Certainty, ShardSpec
from pipeline.sinks.parquet import encode_shard, frame_id, read_rows
from pipeline.tables import AnnotatedShard, DecodedShard, shards_from_table, shards_to_table
from tests.budget import Share, never
from tests.hostile_media import make_corpus, make_mutant
from tests.media import encode_image, picture, read_sequentially, write_video

SEED = 20_261_126
DEADLINE_S = 5.0
GRACE_S = 5.0
MEMORY_BYTES = 512 << 20
SHORT_SIDE = 64
FILES_PER_ARCHIVE = 200
NUM_FILES = 10_000
SHARE = Share(6)
# The cap is on what a child owns, and of that the system keeps no peak but of all that is resident:
# so the exact bound is sampled, and its peak may have besides the libraries' files and the shared
# pixels of one shard.
SHARED_BYTES = 400 << 20
GOOD_SIZE = (96, 64)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@dataclass
class Watch:
    """What is seen of the decoding children while a run lasts."""

    slowest_s: float = 0.0
    longest_silence_s: float = 0.0
    num_children: int = 0
    peak_bytes: int = 0
    most_owned_bytes: int = 0
    caps: set[int] = field(default_factory=set)
    kinds: Counter[str] = field(default_factory=Counter)
    num_frames: int = 0
    num_files: int = 0
    sampling: threading.Lock = field(default_factory=threading.Lock)

    def num_open_files(self) -> int:
        """This process's, without the one that the sampler opens now and then."""
        with self.sampling:
            return num_open_files()

    def line(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.kinds.most_common())
        return (
            f"{self.num_files} files, {self.num_frames} frames, one outcome each ({kinds});"
            f" slowest input {self.slowest_s:.1f} s, longest silence {self.longest_silence_s:.1f} s"
            f" of {DEADLINE_S:g} s, {self.num_children} children started, largest"
            f" {self.most_owned_bytes >> 20} MiB of its own with a cap of {MEMORY_BYTES >> 20} MiB"
            f" and {self.peak_bytes >> 20} MiB with what it shares"
        )


@pytest.fixture
def watch(monkeypatch):
    """Times each input between the child's own signs, and samples the children's memory."""
    seen = Watch()
    real_receive, real_init = (
        decode_process.DecodeProcess.receive,
        decode_process.DecodeProcess.__init__,
    )

    def init(child, limits):
        child.begun_s = None
        real_init(child, limits)
        seen.num_children += 1
        seen.caps.add(_data_limit(child.process.pid))

    def receive(child, timeout_s):
        started = time.monotonic()
        event = None
        try:
            event = real_receive(child, timeout_s)
            return event
        finally:
            now = time.monotonic()
            if child.begun_s is not None:
                seen.longest_silence_s = max(seen.longest_silence_s, now - started)
                if event is None or event[0] in ("begin", "done"):
                    seen.slowest_s = max(seen.slowest_s, now - child.begun_s)
            if event is not None:
                child.begun_s = {"begin": now, "done": None}.get(event[0], child.begun_s)

    monkeypatch.setattr(decode_process.DecodeProcess, "__init__", init)
    monkeypatch.setattr(decode_process.DecodeProcess, "receive", receive)
    stop = threading.Event()

    def sample():
        while not stop.wait(0.02):
            # No name may outlive the loop: it would keep a child alive that its owner forgot.
            pids = [child.process.pid for child in list(decode_process._children)]
            with seen.sampling:
                seen.peak_bytes = max([seen.peak_bytes, *(_memory(pid, "VmHWM") for pid in pids)])
                owned = [_memory(pid, "VmData") for pid in pids]
                seen.most_owned_bytes = max([seen.most_owned_bytes, *owned])

    sampler = threading.Thread(target=sample)
    sampler.start()
    yield seen
    stop.set()
    sampler.join()


def _memory(pid: int, count: str) -> int:
    """VmHWM: the most that was ever resident, shared or not; VmData: what the cap is on, now."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{count}:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def _data_limit(pid: int) -> int:
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith("Max data size"):
            return int(line.split()[3])
    raise AssertionError("no limit of data")


def num_open_files(pid="self"):
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def num_pixel_memories(pid="self"):
    return Path(f"/proc/{pid}/maps").read_text().count("decoded-pixels")


class Goods:
    """Good files that lie among the hostile ones, and the exact pixels that must come of them."""

    def __init__(self, folder: Path) -> None:
        self.files = {
            f"good{seed}.png": encode_image(picture(*GOOD_SIZE, seed=seed), "PNG")
            for seed in range(8)
        }
        self.pixels = {
            (name, 0): picture(*GOOD_SIZE, seed=seed) for seed, name in enumerate(self.files)
        }
        for name, codec in (("good.mp4", "libx264"), ("good.mkv", "libx265")):
            path = write_video(folder / name, num_frames=10, gop=5, codec=codec)
            self.files[name] = path.read_bytes()
            for index, (_, pixels) in enumerate(read_sequentially(path)):
                self.pixels[name, index] = pixels
            path.unlink()

    def check(self, decoded: DecodedShard) -> int:
        """See that every good file's frames are exact; returns how many there were."""
        num_seen = 0
        for record, got in zip(_good_frames(decoded), decoded.pixels, strict=True):
            name = record.asset.partition("-")[2]
            if name in self.files:
                size = got.shape[1], got.shape[0]
                assert np.array_equal(got, resize(self.pixels[name, record.frame_index], size))
                num_seen += 1
        return num_seen


def _good_frames(decoded: DecodedShard):
    return [frame for frame in decoded.frames if frame.error_kind is None]


def fill(folder: Path, corpus, goods: Goods, first: int, count: int) -> dict[str, str]:
    """An archive of mutants with good files between them; what was done, by file name."""
    how = {}
    for number in range(first, first + count):
        mutant = make_mutant(corpus, SEED, number)
        (folder / mutant.name).write_bytes(mutant.data)
        how[mutant.name] = mutant.how
    names = sorted(how)
    for place, (name, data) in enumerate(goods.files.items()):
        # Sorted right behind a mutant.
        before = names[(place * 37) % len(names)].rpartition(".")[0]
        (folder / f"{before}-{name}").write_bytes(data)
    return how


def spec_of(archive: Path) -> JobSpec:
    return check_spec(
        {
            "input": {"url": str(archive)},
            "output": {"url": str(archive.parent / "job")},
            "geometry": {"short_side_px": SHORT_SIDE},
            "limits": {"deadline_s": DEADLINE_S, "memory_bytes": MEMORY_BYTES},
        },
        "the fuzzed job",
    )


def plan_of(spec: JobSpec) -> list[ShardSpec]:
    """As a job plans: through the planner, into Parquet, and back."""
    shards = list(Planner(spec).shards())
    sink = pa.BufferOutputStream()
    pq.write_table(shards_to_table(shards), sink)
    back = shards_from_table(pq.read_table(pa.BufferReader(sink.getvalue())))
    assert len(back) == len(shards)
    return back


def check_outcomes(spec: ShardSpec, decoded: DecodedShard) -> None:
    """Exactly one outcome for each planned frame, and all of it fit to be stored."""
    planned = [(part.asset, index) for part in spec.slices for index in part.frame_index]
    assert [(frame.asset, frame.frame_index) for frame in decoded.frames] == planned
    good = _good_frames(decoded)
    assert decoded.pixels.shape[0] == len(good)
    for frame in decoded.frames:
        if frame.error_kind is not None:
            assert frame.error_kind in ERROR_KINDS
            assert frame.error
            assert frame.error.splitlines() == [frame.error]
            assert len(frame.error) < 1000
    passed = DecodedShard.from_table(decoded.to_table())
    annotated = AnnotatedShard(
        shard_id=spec.shard_id,
        frames=passed.frames,
        class_ids=None,
        depth=None,
        certainty=(Certainty(),) * len(good),
    )
    rows = read_rows(encode_shard(annotated, {}))
    assert [row["frame_id"] for row in rows] == [frame_id(*item) for item in planned]


def fuzz(folder: Path, corpus, watch: Watch, first: int, count: int, is_over=never) -> None:
    """Mutants ``first`` to ``first + count`` as archives of ``FILES_PER_ARCHIVE``."""
    goods = Goods(folder)
    num_good = 0
    for start in range(first, first + count, FILES_PER_ARCHIVE):
        if start > first and is_over():
            break
        archive = folder / f"archive-{start}"
        archive.mkdir()
        how = fill(archive, corpus, goods, start, min(FILES_PER_ARCHIVE, first + count - start))
        spec = spec_of(archive)
        planned: Counter[tuple[str, int]] = Counter()
        num_here = 0
        for shard in plan_of(spec):
            decoded = decode_shard(shard, limits=spec.limits.limits())
            check_outcomes(shard, decoded)
            num_here += goods.check(decoded)
            planned.update((frame.asset, frame.frame_index) for frame in decoded.frames)
            watch.kinds.update(frame.error_kind or "ok" for frame in decoded.frames)
        assert max(planned.values()) == 1
        assets = {asset for asset, _ in planned}
        # A tar has an outcome of its own or its members have.
        assert how.keys() <= assets | {str(p) for asset in assets for p in PurePath(asset).parents}
        assert num_here == len(goods.pixels)
        num_good += num_here
        watch.num_frames += planned.total()
        watch.num_files += len(how)
        for path in archive.iterdir():
            path.unlink()
    assert num_good >= len(goods.pixels)


def fuzz_and_look_for_leaks(folder, corpus, watch, monkeypatch, first, count, is_over=never):
    temporary = folder / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    fuzz(folder, corpus, watch, first, FILES_PER_ARCHIVE // 4)
    gc.collect()
    # Other tests' threads may have memory of their own.
    before, mapped = watch.num_open_files(), num_pixel_memories()
    worker = decode._workers.worker
    # Other tests leave servers for the whole session.
    others = {child.pid for child in psutil.Process().children()} - {worker.pid}
    assert psutil.pid_exists(worker.pid)
    start = first + FILES_PER_ARCHIVE // 4
    fuzz(folder, corpus, watch, start, first + count - start, is_over)
    gc.collect()
    assert watch.num_open_files() <= before
    assert num_open_files(worker.pid) < 20
    assert num_pixel_memories() <= mapped
    assert num_pixel_memories(worker.pid) <= 1
    assert list(temporary.iterdir()) == []
    assert watch.slowest_s <= DEADLINE_S + GRACE_S
    assert watch.caps == {MEMORY_BYTES}
    assert 0 < watch.most_owned_bytes <= MEMORY_BYTES
    assert watch.peak_bytes <= MEMORY_BYTES + SHARED_BYTES
    worker.close()
    # It had kept one for its next shard.
    assert num_pixel_memories() < mapped
    assert {child.pid for child in psutil.Process().children()} <= others


@pytest.mark.timeout(300)
def test_three_hundred_hostile_files(tmp_path, corpus, watch, monkeypatch):
    fuzz_and_look_for_leaks(tmp_path, corpus, watch, monkeypatch, 0, 300)
    assert watch.num_files == 300
    assert set(watch.kinds) >= {"ok", "corrupt", "truncated"}
    print(f"PROOF fuzz (fast): {watch.line()}")


@pytest.mark.slow
@pytest.mark.timeout(SHARE.timeout_s)
def test_ten_thousand_hostile_files(tmp_path, corpus, watch, monkeypatch):
    started = time.monotonic()
    is_over = SHARE.clock()
    fuzz_and_look_for_leaks(tmp_path, corpus, watch, monkeypatch, 1_000_000, NUM_FILES, is_over)
    assert watch.num_files == NUM_FILES or is_over()
    print(f"PROOF fuzz of {NUM_FILES}: {watch.line()}; {time.monotonic() - started:.0f} s")
