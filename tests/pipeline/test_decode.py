"""The isolated decoder: real children that are killed, stopped, crashed and starved."""

import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline import decode, pixel_memory
from pipeline.decode import DecodeLimits, DecodeWorker, decode_shard, probe_asset, probe_assets
from pipeline.errors import UserError
from pipeline.geometry import resize
from pipeline.records import Asset, ShardSpec, Slice
from pipeline.sources.listing import list_assets
from pipeline.sources.slicing import slice_asset
from pipeline.storage import StorageOptions, open_store
from tests.fault_proxy import run_fault_proxy
from tests.media import encode_image, picture, read_sequentially, write_video

SIZE = (64, 32)
QUICK = DecodeLimits(deadline_s=1.0)


@pytest.fixture
def worker():
    with DecodeWorker() as worker:
        yield worker


def slices_of(folder, worker=None, target_frames=64):
    assets = list_assets(open_store(str(folder))).assets
    probes = (worker.probe_assets if worker else probe_assets)(str(folder), assets)
    return tuple(p for probe in probes for p in slice_asset(probe, target_frames=target_frames))


def shard(folder, slices, size=SIZE):
    return ShardSpec(
        shard_id=7,
        root=str(folder),
        input_width_px=size[0],
        input_height_px=size[1],
        slices=tuple(slices),
    )


def image_slice(name, size_bytes, width=96, height=64):
    return Slice(
        asset=name, kind="image", size_bytes=size_bytes, etag="", width=width, height=height
    )


def write_images(folder, *names):
    for seed, name in enumerate(names):
        (folder / name).write_bytes(encode_image(picture(seed=seed), "PNG"))


def kinds(decoded):
    return [frame.error_kind for frame in decoded.frames]


def test_images_and_videos_of_one_shard(tmp_path):
    write_images(tmp_path, "a.png", "c.png")
    expected = [p for _, p in read_sequentially(write_video(tmp_path / "b.mp4", num_frames=12))]
    parts = slices_of(tmp_path)
    decoded = decode_shard(shard(tmp_path, parts))
    assert decoded.shard_id == 7
    assert kinds(decoded) == [None] * 14
    assert [f.asset for f in decoded.frames] == ["a.png", *["b.mp4"] * 12, "c.png"]
    assert [f.frame_index for f in decoded.frames] == [0, *range(12), 0]
    assert decoded.frames[0].pts_s is None
    assert decoded.frames[4].pts_s == pytest.approx(0.1)
    frames = [picture(seed=0), *expected, picture(seed=1)]
    assert decoded.pixels.shape == (14, 32, 64, 3)
    for got, frame in zip(decoded.pixels, frames, strict=True):
        assert np.array_equal(got, resize(frame, SIZE))


def test_a_shards_pixels_stay_while_anybody_holds_them(tmp_path, worker, monkeypatch):
    made = []

    class Counted(pixel_memory.PixelMemory):
        def __init__(self, size_bytes):
            made.append(size_bytes)
            super().__init__(size_bytes)

    monkeypatch.setattr(pixel_memory, "PixelMemory", Counted)
    write_images(tmp_path, *(f"{seed}.png" for seed in range(6)))
    parts = slices_of(tmp_path, worker)
    expected = [resize(picture(seed=seed), SIZE) for seed in range(6)]
    first = worker.decode_shard(shard(tmp_path, parts[:3]))
    second = worker.decode_shard(shard(tmp_path, parts[3:]))
    assert np.array_equal([*first.pixels, *second.pixels], expected)
    kept = first.pixels[1:2]
    del first, second
    for some in (parts[:2], parts[2:4], parts[:3], parts[3:]):
        assert len(worker.decode_shard(shard(tmp_path, some)).pixels) == len(some)
        assert np.array_equal(kept[0], expected[1])
    # Those that were held at a time; none for whoever holds no pixels.
    (tmp_path / "bad.png").write_bytes(b"?")
    bad = worker.decode_shard(shard(tmp_path, [image_slice("bad.png", 1)]))
    worker.decode_shard(shard(tmp_path, parts[:3]))
    assert len(bad.pixels) == 0
    assert made == [3 * SIZE[0] * SIZE[1] * 3] * 2


def test_every_bad_input_is_typed_and_the_rest_is_dense(tmp_path):
    write_images(tmp_path, "good.png", "last.png")
    data = encode_image(picture(), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(data[:-20])
    (tmp_path / "noise.jpg").write_bytes(bytes(range(256)))
    (tmp_path / "grown.jpg").write_bytes(data)
    (tmp_path / "large.png").write_bytes(encode_image(picture(400, 300), "PNG"))
    os.mkfifo(tmp_path / "pipe.mp4")
    known = Slice(
        **{**vars(image_slice("planned.mp4", 5)), "frame_index": (-1,)}
        | {"error_kind": "corrupt", "error": "known"}
    )
    parts = [
        image_slice("cut.jpg", len(data) - 20),
        image_slice("noise.jpg", 256),
        image_slice("good.png", (tmp_path / "good.png").stat().st_size),
        image_slice("grown.jpg", len(data) - 1),
        image_slice("gone.jpg", 5),
        image_slice("large.png", (tmp_path / "large.png").stat().st_size, 400, 300),
        image_slice("pipe.mp4", 0),
        image_slice("heavy.jpg", 1 << 40),
        known,
        image_slice("last.png", (tmp_path / "last.png").stat().st_size),
    ]
    with DecodeWorker(DecodeLimits(max_pixels=100_000)) as worker:
        decoded = worker.decode_shard(shard(tmp_path, parts))
    assert kinds(decoded) == [
        "truncated",
        "corrupt",
        None,
        "fetch",
        "not_found",
        "too_large",
        "not_found",
        "too_large",
        "corrupt",
        None,
    ]
    assert "changed since planning" in decoded.frames[3].error
    assert decoded.frames[8].error == "known"
    assert len(decoded.pixels) == 2
    assert np.array_equal(decoded.pixels[0], resize(picture(seed=0), SIZE))
    assert np.array_equal(decoded.pixels[1], resize(picture(seed=1), SIZE))


def test_a_file_of_the_same_size_that_changed_is_not_decoded(tmp_path, worker):
    for name, seed in (("a.bmp", 0), ("b.bmp", 1)):
        (tmp_path / name).write_bytes(encode_image(picture(seed=seed), "BMP"))
    video = write_video(tmp_path / "c.mp4", num_frames=3)
    parts = slices_of(tmp_path, worker)
    assert kinds(worker.decode_shard(shard(tmp_path, parts))) == [None] * 5
    (tmp_path / "b.bmp").write_bytes(encode_image(picture(seed=2), "BMP"))
    data = bytearray(video.read_bytes())
    data[-1] ^= 1
    video.write_bytes(data)
    decoded = worker.decode_shard(shard(tmp_path, parts))
    assert kinds(decoded) == [None, *["fetch"] * 4]
    for frame in decoded.frames[1:]:
        assert frame.error == "the file has changed since it was planned"


def test_what_could_not_be_listed_is_typed(tmp_path, worker):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "nowhere")
    parts = slices_of(tmp_path, worker)
    assert [part.error_kind for part in parts] == ["not_found"] * 2


def test_what_the_store_forbids_is_typed_and_the_rest_is_read(s3_bucket_url, s3_server, tmp_path):
    store = open_store(s3_bucket_url)
    video = write_video(tmp_path / "c.mp4", num_frames=3).read_bytes()
    for name in ("a.png", "b.png"):
        store.put(name, encode_image(picture(), "PNG"))
    store.put("c.mp4", video)
    assets = list_assets(store).assets
    with run_fault_proxy(s3_server, too_slow_s=1) as proxy, DecodeWorker() as worker:
        options = StorageOptions(endpoint_url=proxy.url)
        probes = worker.probe_assets(s3_bucket_url, assets, options)
        path = f"/{s3_bucket_url.removeprefix('s3://')}"
        proxy.forbid(f"{path}/b.png", f"{path}/c.mp4")
        denied = worker.probe_assets(s3_bucket_url, assets, options)
        parts = [part for probe in probes for part in slice_asset(probe, target_frames=64)]
        spec = replace(shard(tmp_path, parts), root=s3_bucket_url)
        decoded = worker.decode_shard(spec, options)
    assert [probe.error_kind for probe in denied] == [None, "forbidden", "forbidden"]
    assert kinds(decoded) == [None, *["forbidden"] * 4]
    assert "access denied" in decoded.frames[1].error


def test_a_shard_without_good_frames(tmp_path, worker):
    decoded = worker.decode_shard(shard(tmp_path, [image_slice("gone.jpg", 5)]))
    assert kinds(decoded) == ["not_found"]
    assert decoded.pixels.shape == (0, 32, 64, 3)


def test_probing_gives_errors_as_probes(tmp_path, worker):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.mp4").write_bytes(b"x" * 2000)
    (tmp_path / "c.jpg").write_bytes(encode_image(picture(), "JPEG", orientation=6))
    (tmp_path / "d.png").write_bytes(encode_image(picture(400, 300), "PNG"))
    assets = list_assets(open_store(str(tmp_path))).assets
    with DecodeWorker(DecodeLimits(max_pixels=100_000)) as small:
        probes = small.probe_assets(str(tmp_path), assets)
    assert [p.error_kind for p in probes] == ["truncated", "corrupt", None, "too_large"]
    assert (probes[2].width, probes[2].height) == (64, 96)
    gone = Asset(path="gone.jpg", kind="image", size_bytes=1, etag="")
    assert probe_asset(str(tmp_path), gone).error_kind == "not_found"


def test_a_folder_that_is_not_there_is_the_users_mistake(tmp_path, worker):
    with pytest.raises(UserError, match="no such folder"):
        worker.decode_shard(shard(tmp_path / "gone", [image_slice("a.jpg", 5)]))


def test_the_child_is_used_again_and_ends_with_the_worker(tmp_path):
    write_images(tmp_path, "a.png")
    with DecodeWorker() as worker:
        spec = shard(tmp_path, slices_of(tmp_path, worker))
        pid = worker.pid
        first, second = worker.decode_shard(spec), worker.decode_shard(spec)
        assert worker.pid == pid
    assert not psutil.pid_exists(pid)
    assert np.array_equal(first.pixels, second.pixels)


def test_a_forgotten_worker_ends_its_child():
    worker = DecodeWorker()
    with pytest.raises(UserError):
        worker.probe_assets("/nonexistent/x", [image_slice_asset()])
    worker.probe_assets("/", [image_slice_asset()])
    pid = worker.pid
    assert psutil.pid_exists(pid)
    del worker
    gc.collect()
    assert not psutil.pid_exists(pid)


def image_slice_asset():
    return Asset(path="gone.jpg", kind="image", size_bytes=5, etag="")


def test_a_thread_takes_its_child_with_it(tmp_path):
    pids = []

    def work():
        probe_asset(str(tmp_path), image_slice_asset())
        pids.append(decode._workers.worker.pid)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    gc.collect()
    assert not psutil.pid_exists(pids[0])


def test_an_idle_child_that_was_killed_is_replaced(tmp_path, worker):
    write_images(tmp_path, "a.png")
    spec = shard(tmp_path, slices_of(tmp_path, worker))
    psutil.Process(worker.pid).kill()
    assert kinds(worker.decode_shard(spec)) == [None]


def test_a_child_that_is_killed_at_work_is_replaced(tmp_path, worker):
    write_video(tmp_path / "a.mp4", num_frames=300, gop=10, size=(320, 192))
    parts = slices_of(tmp_path, worker)
    first = worker.pid

    def kill():
        time.sleep(0.1)
        os.kill(first, signal.SIGKILL)

    threading.Thread(target=kill).start()
    decoded = worker.decode_shard(shard(tmp_path, parts * 5, (320, 192)))
    assert worker.pid != first
    assert kinds(decoded) == [None] * 1500
    expected = [pixels for _, pixels in read_sequentially(tmp_path / "a.mp4")]
    for record, got in zip(decoded.frames, decoded.pixels, strict=True):
        assert np.array_equal(got, expected[record.frame_index])


# Runs at the start of a child, from the import path that it shares with the parent: some inputs
# then really crash it, hang it, or eat its memory.
TRAPS = """
import os, signal, sys, time
if "pipeline.decode_child" in sys.orig_argv:
    import cv2
    from pathlib import Path
    imdecode, hoard = cv2.imdecode, []
    def trapped(buffer, flags):
        data = buffer.tobytes()
        if b"HOARD" in data:
            try:
                while True:
                    hoard.append(bytearray(1 << 20))
            except MemoryError:
                del hoard[-4:]
        if b"CRASH" in data:
            os.kill(os.getpid(), signal.SIGSEGV)
        if b"ONCE" in data and not Path(__file__).with_name("crashed").exists():
            Path(__file__).with_name("crashed").touch()
            os.abort()
        if b"HANG" in data:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            time.sleep(3600)
        if b"MEMORY" in data:
            bytearray(1 << 40)
        if b"LIMIT" in data:
            bytearray(1 << 29)
        return imdecode(buffer, flags)
    cv2.imdecode = trapped
    if Path(__file__).with_name("videos").exists():
        from pipeline.sources import video_frames
        def read_frames(*_, **__):
            with Path(__file__).with_name("videos").open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGSEGV)
        video_frames.read_frames = read_frames
"""


@pytest.fixture
def traps(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("traps")
    (folder / "sitecustomize.py").write_text(TRAPS)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def trap(folder, name, word):
    data = encode_image(picture(), "PNG") + word
    (folder / name).write_bytes(data)
    return image_slice(name, len(data))


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        (b"CRASH", "crash"),
        (b"HANG", "timeout"),
        (b"MEMORY", "out_of_memory"),
        (b"LIMIT", "out_of_memory"),
        (b"ONCE", None),
    ],
)
def test_what_an_input_does_to_the_child_is_its_own_affair(tmp_path, traps, word, kind):
    parts = [trap(tmp_path, "a.png", b""), trap(tmp_path, "b.png", word)]
    write_video(tmp_path / "c.mp4", num_frames=5)
    limits = DecodeLimits(deadline_s=1.0, memory_bytes=512 << 20)
    with DecodeWorker(limits) as worker:
        (video,) = (part for part in slices_of(tmp_path, worker) if part.kind == "video")
        decoded = worker.decode_shard(shard(tmp_path, [*parts, video]))
    assert kinds(decoded) == [None, kind] + [None] * 5
    assert len(decoded.pixels) == 6 + (kind is None)
    assert np.array_equal(decoded.pixels[0], resize(picture(), SIZE))
    if word == b"CRASH":
        assert "SIGSEGV" in decoded.frames[1].error


def test_a_child_without_the_memory_to_read_videos_is_replaced(tmp_path, traps):
    write_video(tmp_path / "a.mp4", num_frames=5)
    limits = DecodeLimits(memory_bytes=512 << 20)
    with DecodeWorker(limits) as worker:
        (video,) = slices_of(tmp_path, worker)
    hoarder = trap(tmp_path, "b.png", b"HOARD")
    with DecodeWorker(limits) as worker:
        assert kinds(worker.decode_shard(shard(tmp_path, [hoarder]))) == [None]
        first = worker.pid
        assert kinds(worker.decode_shard(shard(tmp_path, [video]))) == [None] * 5
        assert worker.pid != first


def test_a_video_of_several_slices_is_tried_three_times_in_all(tmp_path, traps):
    write_images(tmp_path, "a.png", "c.png")
    write_video(tmp_path / "b.mp4", num_frames=20, gop=5)
    with DecodeWorker() as worker:
        first, *slices, last = slices_of(tmp_path, worker, target_frames=5)
    assert len(slices) == 4
    (traps / "videos").touch()
    with DecodeWorker() as worker:
        decoded = worker.decode_shard(shard(tmp_path, [*slices[:2], first, *slices[2:], last]))
    assert kinds(decoded) == ["crash"] * 10 + [None] + ["crash"] * 10 + [None]
    assert {f.error for f in decoded.frames} == {None, "the decoder was ended by SIGSEGV"}
    assert (traps / "videos").read_text() == "xxx"
    assert len(decoded.pixels) == 2


def test_a_stopped_child_counts_as_hanging(tmp_path):
    write_video(tmp_path / "a.mp4", num_frames=300, gop=10, size=(320, 192))
    with DecodeWorker(QUICK) as worker:
        parts = slices_of(tmp_path, worker)
        first = worker.pid

        def stop():
            time.sleep(0.1)
            os.kill(first, signal.SIGSTOP)

        threading.Thread(target=stop).start()
        decoded = worker.decode_shard(shard(tmp_path, parts * 5, (320, 192)))
        assert worker.pid != first
    assert kinds(decoded) == [None] * 1500


def run_python(code, *, check=True):
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=check,
    )


USE = """
import os, sys
from pipeline.decode import probe_asset, _workers
from pipeline.records import Asset
asset = Asset(path="gone.jpg", kind="image", size_bytes=5, etag="")
assert probe_asset("/", asset).error_kind == "not_found"
print(_workers.worker.pid, flush=True)
"""


def gone(pid, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not psutil.pid_exists(pid)


@pytest.mark.parametrize("ending", ["", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_no_child_is_left_however_the_parent_ends(ending):
    done = run_python(USE + ending, check=not ending)
    assert gone(int(done.stdout))
    assert done.stderr == ""


def test_no_child_is_left_when_the_parent_dies_during_a_decode(tmp_path):
    write_video(tmp_path / "a.mp4", num_frames=300, gop=300, size=(320, 192))
    code = USE + textwrap.dedent(
        f"""
        from pipeline.sources.listing import list_assets
        from pipeline.storage import StorageOptions, open_store
        from pipeline.decode import probe_assets
        assets = list_assets(open_store({str(tmp_path)!r})).assets
        print(flush=True)
        probe_assets({str(tmp_path)!r}, assets * 10_000)
        """
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        parent.stdout.readline()
        time.sleep(0.3)
        assert psutil.Process(pid).cpu_times().user > 0
        parent.kill()
    assert gone(pid)


def test_a_store_that_never_answers_is_a_timeout(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        DecodeWorker(DecodeLimits(deadline_s=4)) as worker,
    ):
        options = StorageOptions(
            endpoint_url=f"http://127.0.0.1:{server.getsockname()[1]}", region="us-east-1"
        )
        asset = Asset(path="a.jpg", kind="image", size_bytes=5, etag="")
        (probe,) = worker.probe_assets("s3://bucket/prefix", [asset], options)
    assert probe.error_kind == "timeout"
    assert probe.error == "no progress for 4 s"


def test_a_forked_process_gets_a_child_of_its_own():
    code = USE + textwrap.dedent(
        """
        forked = os.fork()
        if forked == 0:
            mine = _workers
            assert probe_asset("/", asset).error_kind == "not_found"
            from pipeline.decode import _workers
            print(_workers.worker.pid, flush=True)
            sys.exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
        assert probe_asset("/", asset).error_kind == "not_found"
        print(_workers.worker.pid, flush=True)
        """
    )
    first, forked, again = map(int, run_python(code).stdout.split())
    assert first == again != forked
    assert gone(first)
    assert gone(forked)


def test_the_parent_imports_no_decoder():
    code = "import sys, pipeline.decode; print({'av', 'PIL', 'torch', 'ray'} & set(sys.modules))"
    assert run_python(code).stdout.strip() == "set()"


def test_a_fresh_child_has_imported_all_that_images_need_and_no_more(tmp_path):
    for format in ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP"):
        (tmp_path / format).write_bytes(encode_image(picture(), format))
    code = f"""
    import sys, pipeline.decode_child
    from pathlib import Path
    from pipeline.sources.assets import DecodeLimits
    from pipeline.sources.images import decode_image
    fresh = set(sys.modules)
    for path in Path({str(tmp_path)!r}).iterdir():
        decode_image(path.read_bytes(), DecodeLimits())
    heavy = {{"av", "boto3", "http", "obstore", "pyarrow", "pydantic", "ray", "ssl", "torch"}}
    print(heavy & fresh, set(sys.modules) - fresh, "PIL.PdfImagePlugin" in fresh)
    """
    assert run_python(code).stdout.strip() == "set() set() False"
