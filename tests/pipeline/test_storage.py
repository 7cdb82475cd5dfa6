"""The storage adapter on a local folder, a real S3 server (weed) and moto's."""

import errno
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import (
    CredentialsError,
    InputError,
    ObjectExistsError,
    ObjectForbiddenError,
    ObjectNotFoundError,
    StorageError,
    StoreUnavailableError,
    UserError,
)
from pipeline.storage import (
    StorageOptions,
    Store,
    commit,
    compile_glob,
    create_once,
    escape_path,
    join_url,
    open_input,
    open_store,
    probe_conditional_writes,
    safe_relative,
    split_glob,
    unescape_path,
)
from pipeline.storage.base import NoHardLinksError
from pipeline.storage.local import LocalStore

BACKENDS = ("local", "weed", "moto")
# Names that every backend keeps apart. weed itself folds "//" and "\\", so those are moto's.
ODD_NAMES = [
    "sp ace/b c.jpg",
    "pct%20x.jpg",
    "pct%.jpg",
    "100%/a%2Fb",
    "%2e%2e/x",
    "h#ash",
    "q?mark",
    "uni/\u00fc\u20ac\u6f22.jpg",
    "nfc/\u00e9",
    "nfd/e\u0301",
    "emoji\U0001f600",
    "plus+a",
    "amp&b=c;d,e:f@g$h!",
    "quo\"te's",
    "star*[x].jpg",
    "tilde~^`|{}<>",
    "new\nline",
    "tab\tx",
    "del\x7f",
    "ctl\x01",
    "c1\u0085",
    ".hidden/.a",
]
WRITE_FOR_EVER = """
import itertools, sys
from pipeline.storage import open_store
store = open_store(sys.argv[1])
store.put("first", b"")
for index in itertools.count():
    store.put(f"{index}", bytes(4_000_000))
    store.create(f"{index}.json", bytes(1000))
"""
S3_ONLY_NAMES = ["dbl//slash", "back\\slash", "a/./b", "a/../b", "/leading"]


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return make_store(request, request.param, tmp_path)


def refuse_nameless_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS does."""
    real = os.open

    def refuse(path, flags: int, *more, **named) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)


def refuse_links(monkeypatch: pytest.MonkeyPatch, number: int = errno.EPERM) -> None:
    """As FAT does."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def make_store(request: pytest.FixtureRequest, backend: str, tmp_path: Path) -> Store:
    if backend == "local":
        return open_store(str(tmp_path / "store"), create=True)
    endpoint_url = request.getfixturevalue("s3_server" if backend == "weed" else "moto_server")
    options = StorageOptions(endpoint_url=endpoint_url)
    return open_store(f"s3://out/{uuid4().hex}", options, create=True)


class TestObjects:
    @pytest.mark.parametrize("data", [b"", b"x", os.urandom(300_000)], ids=["empty", "1", "300k"])
    def test_round_trip(self, store: Store, data: bytes):
        store.put("a/b", data)
        assert store.read("a/b") == data
        assert store.exists("a/b")
        info = store.head("a/b")
        assert info is not None
        assert (info.key, info.size_bytes) == ("a/b", len(data))

    def test_put_replaces_and_takes_any_buffer(self, store: Store):
        for data in (b"one", bytearray(b"two"), memoryview(b"-three")[1:]):
            store.put("k", data)
            assert store.read("k") == bytes(data)

    def test_read_range(self, store: Store):
        store.put("k", bytes(range(100)))
        assert store.read_range("k", 10, 5) == bytes(range(10, 15))
        assert store.read_range("k", 95, 50) == bytes(range(95, 100))
        assert store.read_range("k", 100, 5) == b""
        assert store.read_range("k", 5, 0) == b""
        store.put("empty", b"")
        assert store.read_range("empty", 0, 5) == b""

    def test_absent(self, store: Store):
        store.put("folder/k", b"")
        for key in ("absent", "folder", "folder/k/below", "a/b/c"):
            assert store.head(key) is None
            assert not store.exists(key)
            for call in (
                store.read,
                store.open_seekable,
                store.fingerprint,
                lambda key: store.read_range(key, 0, 1),
            ):
                with pytest.raises(ObjectNotFoundError, match=re.escape(f"{store.url}/{key}")):
                    call(key)

    def test_create_refuses_to_replace(self, store: Store):
        store.create("c/k", b"first")
        with pytest.raises(ObjectExistsError, match="exists already"):
            store.create("c/k", b"second")
        assert store.read("c/k") == b"first"

    def test_list(self, store: Store):
        keys = {"a", "b/c", "b/d/e", "b/d/f", ".hidden", "b.x/y"}
        for key in keys:
            store.put(key, key.encode())
        found = {info.key: info.size_bytes for info in store.list()}
        assert found == {key: len(key) for key in keys}
        assert {info.key for info in store.list("b")} == {"b/c", "b/d/e", "b/d/f"}
        assert {info.key for info in store.list("b/d/")} == {"b/d/e", "b/d/f"}
        assert {info.key for info in store.list("b", recursive=False)} == {"b/c"}
        assert {info.key for info in store.list(recursive=False)} == {"a", ".hidden"}
        assert list(store.list("absent")) == []
        assert list(store.list("a/b")) == []
        assert set(store.list_folders()) == {"b", "b.x"}
        assert list(store.list_folders("b")) == ["b/d"]
        assert list(store.list_folders("absent")) == []

    def test_list_over_several_pages(self, store: Store):
        keys = [f"p/{index:04}" for index in range(1100)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.put(key, b""), keys))
        assert sorted(info.key for info in store.list("p")) == keys
        store.delete(keys)
        assert list(store.list("p")) == []

    def test_glob(self, store: Store):
        keys = ["a.jpg", "b/a.jpg", "b/c/a.jpg", "b/c/a.png", "d/c/x[1].jpg", ".h/a.jpg"]
        for key in keys:
            store.put(key, b"")
        for pattern in (
            None,
            "*",
            "*.jpg",
            "**",
            "**/*.jpg",
            "*/*.jpg",
            "b/**",
            "b/**/a.*",
            "*/c/*",
            "*/c/a.jpg",
            "b/c/a.jpg",
            "d/c/x[[]1].jpg",
            "absent",
            "absent/*",
            "?/c/[!x]*",
        ):
            expected = [key for key in keys if compile_glob(pattern or "**").fullmatch(key)]
            assert sorted(info.key for info in store.glob(pattern)) == sorted(expected), pattern

    def test_delete_tolerates_absence(self, store: Store):
        store.put("a", b"")
        store.put("b/c", b"")
        store.delete(["a", "absent", "b/c", "x/y"])
        store.delete([])
        assert list(store.list()) == []

    def test_read_many_keeps_order_and_gives_errors(self, store: Store):
        keys = [f"k{index}" for index in range(50)]
        for key in keys:
            store.put(key, key.encode())
        asked = [*keys[:20], "absent", *keys[20:]]
        answers = list(store.read_many(iter(asked), threads=4))
        assert [key for key, _ in answers] == asked
        assert isinstance(dict(answers)["absent"], ObjectNotFoundError)
        assert all(data == key.encode() for key, data in answers if key != "absent")

    def test_fingerprint_follows_the_content(self, store: Store):
        store.put("k", b"1" * 200_000)
        first = store.fingerprint("k")
        assert first == store.fingerprint("k")
        store.put("k", b"1" * 199_999 + b"2")
        second = store.fingerprint("k")
        store.put("k", b"1" * 199_999)
        assert len({first, second, store.fingerprint("k")}) == 3
        for data in (b"", b"x", os.urandom(100_000), os.urandom(300_000)):
            store.put("k", data)
            assert store.read_with_fingerprint("k") == (data, store.fingerprint("k"))
        info = store.head("k")
        assert info is not None
        assert info.etag in {"", store.fingerprint("k")}

    def test_open_seekable(self, store: Store, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("pipeline.storage.seekable._BLOCK_BYTES", 1000)
        data = os.urandom(20_500)
        store.put("k", data)
        with store.open_seekable("k") as file:
            assert file.seekable()
            assert file.seek(-10, os.SEEK_END) == 20_490
            assert file.read() == data[-10:]
            file.seek(999)
            assert file.read(3) == data[999:1002]
            assert file.seek(5000) == file.tell() == 5000
            file.seek(-4000, os.SEEK_CUR)
            assert file.read(9000) == data[1000:10_000]
            file.seek(0)
            assert file.read() == data
            assert file.read() == b""

    def test_pickles_and_reopens(self, store: Store):
        store.put("k", b"v")
        copy = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own bytes
        assert copy.url == store.url
        assert copy.read("k") == b"v"
        assert repr(copy) == repr(store)

    @pytest.mark.parametrize("name", ODD_NAMES)
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_odd_names(
        self, request: pytest.FixtureRequest, tmp_path: Path, backend: str, name: str
    ):
        if backend == "moto" and "\n" in name:
            pytest.skip("moto routes no URL with an escaped newline")
        check_name(make_store(request, backend, tmp_path), name)

    @pytest.mark.parametrize("name", S3_ONLY_NAMES)
    def test_odd_names_on_s3(self, request: pytest.FixtureRequest, tmp_path: Path, name: str):
        check_name(make_store(request, "moto", tmp_path), name)

    def test_large_objects_are_sent_in_parts(
        self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("pipeline.storage.s3._SINGLE_PUT_BYTES", 6 * 1024**2)
        monkeypatch.setattr("pipeline.storage.s3._PART_BYTES", 5 * 1024**2)
        store = make_store(request, "weed", tmp_path)
        data = os.urandom(11 * 1024**2)
        store.put("big", data)
        assert store.read("big") == data
        assert store.fingerprint("big").endswith("-3")
        store.create("big-once", data)
        assert "-" not in store.fingerprint("big-once")


def check_name(store: Store, name: str) -> None:
    data = name.encode()
    store.create(name, b"0")
    with pytest.raises(ObjectExistsError):
        store.create(name, b"1")
    store.put(name, data)
    assert store.read(name) == data
    assert store.read_range(name, 1, 2) == data[1:3]
    assert store.read_range(name, 1000, 2) == b""
    info = store.head(name)
    assert info is not None
    assert info.size_bytes == len(data)
    assert [listed.key for listed in store.list()] == [name]
    with store.open_seekable(name) as file:
        assert file.read() == data
    store.delete([name])
    assert store.head(name) is None
    with pytest.raises(ObjectNotFoundError) as caught:
        store.read(name)
    assert len(str(caught.value).splitlines()) == 1


class TestLocal:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return open_store(str(tmp_path))

    def test_names_that_are_not_utf8(self, store: Store, tmp_path: Path):
        name = os.fsdecode(b"caf\xe9/\xff.jpg")
        path = tmp_path / name
        path.parent.mkdir()
        path.write_bytes(b"v")
        assert [info.key for info in store.list()] == [name]
        assert list(store.list_folders()) == [os.fsdecode(b"caf\xe9")]
        assert store.read(name) == b"v"
        assert store.fingerprint(name)
        store.put(name, b"w")
        assert unescape_path(escape_path(name)) == name
        with pytest.raises(ObjectNotFoundError) as caught:
            store.read(f"{name}x")
        str(caught.value).encode()
        folder = open_store(join_url(store.url, os.fsdecode(b"caf\xe9")))
        folder.url.encode()
        assert open_store(folder.url).read(os.fsdecode(b"\xff.jpg")) == b"w"
        assert open_store(join_url(folder.url, "%")[:-4]).url == folder.url

    def test_follows_links_without_loops(self, store: Store, tmp_path: Path):
        outside = tmp_path / "outside"
        (outside / "deep").mkdir(parents=True)
        (outside / "deep" / "f").write_bytes(b"12")
        root = tmp_path / "root"
        root.mkdir()
        (root / "file").symlink_to(outside / "deep" / "f")
        (root / "folder").symlink_to(outside)
        (root / "self").symlink_to(root)
        (outside / "back").symlink_to(root)
        (root / "dangling").symlink_to(tmp_path / "nowhere")
        (root / "circle").symlink_to(root / "circle")
        os.mkfifo(root / "pipe")
        listed = {info.key: info.size_bytes for info in open_store(str(root)).list()}
        assert listed == {"file": 2, "folder/deep/f": 2, "dangling": 0, "circle": 0}

    def test_a_link_to_a_folder_is_followed_once(self, store: Store, tmp_path: Path):
        for name in "abcdefgh":
            store.put(f"{name}/x", b"")
        for name in "abcdefgh":
            for other in set("abcdefgh") - {name}:
                (tmp_path / name / f"to-{other}").symlink_to(tmp_path / other)
        listed = [info.key for info in store.list()]
        # Every folder in its own place and by one link; otherwise there are 109,600 paths.
        assert len(listed) == len(set(listed)) == 16
        assert {f"{name}/x" for name in "abcdefgh"} < set(listed)
        assert listed == [info.key for info in store.list()]

    def test_folders_nest_deeper_than_calls(self, store: Store, tmp_path: Path):
        at = os.open(tmp_path, os.O_RDONLY)
        for _ in range(2500):
            os.mkdir("d", dir_fd=at)
            below = os.open("d", os.O_RDONLY, dir_fd=at)
            os.close(os.open("f", os.O_CREAT, dir_fd=at))
            os.close(at)
            at = below
        os.close(at)
        left_out: list[str] = []
        listed = list(store.list(on_error=lambda key, _: left_out.append(key)))
        assert 1200 < len(listed) < 2500
        # Where the path is longer than a call may name.
        assert len(left_out) <= 2
        with pytest.raises(StorageError, match="File name too long"):
            list(store.list())
        # Python's own rmtree, and so pytest, would call itself too often.
        subprocess.run(["/bin/rm", "-r", tmp_path / "d"], check=True)

    def test_a_pipe_does_not_hang_the_reader(self, store: Store, tmp_path: Path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ObjectNotFoundError, match="not a regular file"):
            store.read("pipe")
        assert store.head("pipe") is None

    def test_what_has_nothing_to_read_now_is_an_error(self, store: Store, tmp_path: Path):
        # As /proc/kmsg is, through a link: regular to look at, and empty for the moment.
        ours, theirs = os.openpty()
        try:
            terminal = os.open(os.ttyname(theirs), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            (tmp_path / "a").write_bytes(b"x" * 10)
            opened = patch.object(store, "open_seekable", lambda _: os.fdopen(terminal, "rb"))
            with opened, pytest.raises(StorageError, match="it has no end"):
                store.read("a")
        finally:
            os.close(ours)
            os.close(theirs)

    @pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "a//b", "./a", "", "a\0b"])
    def test_keys_stay_below_the_root(self, store: Store, key: str):
        for call in (store.read, store.head, lambda key: store.put(key, b"")):
            with pytest.raises(StorageError):
                call(key)
        assert isinstance(next(store.read_many([key]))[1], StorageError)

    @pytest.mark.parametrize("nameless", [True, False])
    def test_hides_temporary_files_and_leaves_none(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool
    ):
        if not nameless:
            refuse_nameless_files(monkeypatch)
        store.put("a", b"old")

        def fail(*_: object) -> None:
            assert [info.key for info in store.list()] == ["a"]
            assert len(list(tmp_path.iterdir())) == (1 if nameless else 2)
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        for write in (store.put, store.create):
            with pytest.raises(StoreUnavailableError, match="No space left"):
                write("a", b"new")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert store.read("a") == b"old"

    @pytest.mark.parametrize("nameless", [True, False])
    def test_puts_and_creates(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nameless: bool
    ):
        if not nameless:
            refuse_nameless_files(monkeypatch)
        for data in (b"first", b"second"):
            store.put("x/a", data)
            assert store.read("x/a") == data
        store.create("x/b", b"only")
        with pytest.raises(ObjectExistsError):
            store.create("x/b", b"late")
        assert store.read("x/b") == b"only"
        assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["a", "b"]
        for name in ("a", "b"):
            assert (tmp_path / "x" / name).stat().st_mode & 0o777 == 0o666 & ~current_umask()

    @pytest.mark.parametrize("nameless", [True, False])
    @pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
    def test_without_hard_links(
        self,
        store: Store,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        nameless: bool,
        number: int,
    ):
        refuse_links(monkeypatch, number)
        if not nameless:
            refuse_nameless_files(monkeypatch)
        for data in (b"first", b"second"):
            store.put("x/a", data)
            assert store.read("x/a") == data
        for create in (
            lambda: store.create("x/b", b"only"),
            lambda: create_once(store, "x/b", b"only"),
            lambda: probe_conditional_writes(store, "x"),
        ):
            with pytest.raises(NoHardLinksError, match="this file system has no hard links"):
                create()
        assert [path.name for path in (tmp_path / "x").iterdir()] == ["a"]

    def test_reports_what_a_listing_leaves_out(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        for key in ("a/k", "b/k", "b/c/k"):
            store.put(key, b"v")
        real = os.scandir

        def scandir(folder: Path):
            if Path(folder).name == "b":
                raise PermissionError(13, "Permission denied")
            return real(folder)

        monkeypatch.setattr(os, "scandir", scandir)
        for pattern, expected in ((None, ["a/k"]), ("*/*", ["a/k"]), ("*/*/k", []), ("b/*", [])):
            with pytest.raises(ObjectForbiddenError):
                list(store.glob(pattern))
            reported: list[str] = []
            found = store.glob(pattern, on_error=lambda key, _, to=reported: to.append(key))
            assert [info.key for info in found] == expected
            assert reported == ["b"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may search everything")
    def test_a_folder_that_may_be_listed_but_not_searched(self, store: Store, tmp_path: Path):
        store.put("a/b/k", b"v")
        store.put("a/k", b"v")
        (tmp_path / "a").chmod(0o400)
        reported: list[str] = []
        found = list(store.glob(None, on_error=lambda key, _: reported.append(key)))
        (tmp_path / "a").chmod(0o700)
        assert [(info.key, info.size_bytes) for info in found] == [("a/k", 0)]
        assert reported == ["a/b"]

    def test_a_file_whose_size_is_refused_is_listed(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        store.put("k", b"v")
        (tmp_path / "link").symlink_to(tmp_path / "k")

        def refuse(_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pipeline.storage.local._status", refuse)
        with pytest.raises(ObjectForbiddenError):
            list(store.list())
        found = store.list(on_error=lambda key, _: pytest.fail(key))
        assert [(info.key, info.size_bytes) for info in found] == [("k", 0), ("link", 0)]

    def test_folders_without_links(self, store: Store, tmp_path: Path):
        (tmp_path / "a").mkdir()
        (tmp_path / "loop").symlink_to(tmp_path)
        assert list(store.list_folders()) == ["a", "loop"]
        assert list(store.list_folders(follow_links=False)) == ["a"]

    def test_a_killed_writer_leaves_nothing(self, tmp_path: Path):
        for delay_s in (0.02, 0.05, 0.08, 0.11, 0.14):
            with subprocess.Popen([sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)]) as writer:
                while not (tmp_path / "first").exists():
                    assert writer.poll() is None
                    time.sleep(0.01)
                time.sleep(delay_s)
                writer.kill()
            assert list(tmp_path.glob(".*")) == []
            (tmp_path / "first").unlink()

    def test_syncs_the_file_and_every_new_folder(
        self, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        synced: list[str] = []
        real = os.fsync

        def spy(descriptor: int) -> None:
            synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
            real(descriptor)

        monkeypatch.setattr(os, "fsync", spy)
        store.create("x/y/k", b"v")
        assert synced[:2] == [tmp_path.name, "x"]
        assert synced[2].startswith("#"), "a file without a name"
        assert synced[3:] == ["y"]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_forbidden(self, store: Store, tmp_path: Path):
        (tmp_path / "k").write_bytes(b"")
        (tmp_path / "k").chmod(0)
        with pytest.raises(ObjectForbiddenError):
            store.read("k")

    def test_forbidden_by_the_system(self, store: Store, monkeypatch: pytest.MonkeyPatch):
        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(ObjectForbiddenError, match="permission denied"):
            store.read("k")

    def test_too_long_a_name(self, store: Store):
        with pytest.raises(StorageError, match="too long"):
            store.put("x" * 300, b"")


class TestReadMany:
    def test_holds_a_bounded_number(self):
        started = []
        lock = threading.Lock()

        class Counting(LocalStore):
            def read(self, key: str) -> bytes:
                with lock:
                    started.append(key)
                return b""

        answers = Counting("/").read_many((f"{index}" for index in range(1000)), threads=4)
        for taken in range(1, 20):
            next(answers)
            assert len(started) <= taken + 2 * 4
        answers.close()

    def test_other_exceptions_are_not_swallowed(self):
        class Broken(LocalStore):
            def read(self, key: str) -> bytes:
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            list(Broken("/").read_many(["a", "b"]))


RACER = """
import pickle, sys, time
from concurrent.futures import ThreadPoolExecutor
from pipeline.errors import StorageError

store, name, threads, rounds = pickle.load(sys.stdin.buffer)
store.put(f"warm/{name}", b"")
print("ready", flush=True)
start_at = float(sys.stdin.readline())

def race(thread):
    won = []
    for round_ in range(rounds):
        time.sleep(max(0, start_at + round_ * 0.05 - time.time()))
        try:
            store.create(f"race/{round_}", f"{name}-{thread}".encode())
        except StorageError:
            continue
        won.append(f"{round_} {name}-{thread}")
    return won

with ThreadPoolExecutor(threads) as pool:
    for won in pool.map(race, range(threads)):
        print(*won, sep="\\n")
"""


class TestCreateOnce:
    def test_one_winner_among_threads(self, store: Store):
        num_rounds, writers = 4, 16

        def race(round_: int, pool: ThreadPoolExecutor) -> None:
            barrier = threading.Barrier(writers)

            def write(index: int) -> tuple[bytes, bytes]:
                mine = f"{round_}-{index}".encode()
                barrier.wait()
                return mine, create_once(store, f"race/{round_}", mine)

            outcomes = list(pool.map(write, range(writers)))
            held = store.read(f"race/{round_}")
            assert {told for _, told in outcomes} == {held}
            assert [mine for mine, told in outcomes if told == mine] == [held]

        # Rounds overlap because weed makes a loser wait for seconds.
        with ThreadPoolExecutor(5) as rounds, ThreadPoolExecutor(num_rounds * writers) as pool:
            assert len(list(rounds.map(race, range(num_rounds), [pool] * num_rounds))) == num_rounds

    def test_one_winner_among_processes(self, store: Store, project_root: Path):
        num_rounds = 20
        with ExitStack() as stack:
            racers = [
                stack.enter_context(
                    subprocess.Popen(
                        [sys.executable, "-c", RACER],
                        cwd=project_root,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                    )
                )
                for _ in range(4)
            ]
            for index, racer in enumerate(racers):
                assert racer.stdin is not None
                racer.stdin.write(pickle.dumps((store, f"p{index}", 4, num_rounds)))
                racer.stdin.flush()
            for racer in racers:
                assert racer.stdout is not None
                assert racer.stdout.readline() == b"ready\n"
            answers = []
            start_at = f"{time.time() + 0.2}\n".encode()
            with ThreadPoolExecutor(len(racers)) as pool:
                for out, _ in pool.map(lambda racer: racer.communicate(start_at), racers):
                    answers += out.decode().split("\n")
        winners = sorted(answer for answer in answers if answer)
        held = sorted(
            f"{index} {store.read(f'race/{index}').decode()}" for index in range(num_rounds)
        )
        assert winners == held

    def test_tells_mine_from_another(self, store: Store):
        assert create_once(store, "k", b"first") == b"first"
        assert create_once(store, "k", b"second") == b"first"
        assert create_once(store, "k", b"first") == b"first"


class Faulty(LocalStore):
    """Fails as the given script says: one entry per create, then per read."""

    def __init__(self, root: str, creates: list[str], reads: list[Exception | None]) -> None:
        super().__init__(root)
        self.creates = creates
        self.reads = reads
        self.num_creates = 0

    def create(self, key: str, data: bytes | bytearray | memoryview) -> None:
        self.num_creates += 1
        fault = self.creates.pop(0) if self.creates else ""
        if fault == "before":
            raise StoreUnavailableError("connection refused")
        if fault == "lost":
            super().create(key, b"theirs")
        super().create(key, data)
        if fault == "lying conflict":
            raise ObjectExistsError("412 on its own success")
        if fault == "after":
            raise TimeoutError("no answer")

    def read(self, key: str) -> bytes:
        fault = self.reads.pop(0) if self.reads else None
        if fault is not None:
            raise fault
        return super().read(key)


class TestCreateOnceUnderFaults:
    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(commit, "_FIRST_PAUSE_S", 0)

    @pytest.mark.parametrize(
        ("creates", "held", "num_creates"),
        [
            ([], b"mine", 1),
            (["after"], b"mine", 1),
            (["lying conflict"], b"mine", 1),
            (["lost"], b"theirs", 1),
            (["before"], b"mine", 2),
            (["before", "before", "after"], b"mine", 3),
            (["before", "lost"], b"theirs", 2),
        ],
    )
    def test_reads_back(self, tmp_path: Path, creates: list[str], held: bytes, num_creates: int):
        store = Faulty(str(tmp_path), creates, [])
        assert create_once(store, "k", b"mine") == held
        assert store.num_creates == num_creates

    def test_keeps_reading_until_it_knows(self, tmp_path: Path):
        reads: list[Exception | None] = [StoreUnavailableError("503"), ObjectForbiddenError("403")]
        store = Faulty(str(tmp_path), ["after"], reads)
        assert create_once(store, "k", b"mine") == b"mine"
        assert store.num_creates == 1

    def test_unreadable_is_unknown(self, tmp_path: Path):
        store = Faulty(str(tmp_path), ["after"], [TimeoutError("no answer")] * 3)
        with pytest.raises(StoreUnavailableError, match="unknown"):
            create_once(store, "k", b"mine", attempts=3)
        assert store.num_creates == 1

    def test_gives_up_on_a_store_that_takes_nothing(self, tmp_path: Path):
        store = Faulty(str(tmp_path), ["before"] * 9, [])
        with pytest.raises(StoreUnavailableError, match="after 4 attempts: connection refused"):
            create_once(store, "k", b"mine", attempts=4)
        assert store.num_creates == 4


class TestProbe:
    def test_passes_and_leaves_nothing(self, store: Store):
        assert probe_conditional_writes(store, "probe")
        assert list(store.list()) == []

    def test_sees_a_store_that_ignores_the_condition(self, tmp_path: Path):
        class Ignoring(LocalStore):
            def create(self, key: str, data: bytes | bytearray | memoryview) -> None:
                self.put(key, data)

        store = Ignoring(str(tmp_path))
        assert not probe_conditional_writes(store, "probe")
        assert list(store.list()) == []

    def test_sees_a_store_that_checks_and_then_writes(self, tmp_path: Path):
        class Racy(LocalStore):
            def create(self, key: str, data: bytes | bytearray | memoryview) -> None:
                if self.exists(key):
                    raise ObjectExistsError(key)
                time.sleep(0.01)
                self.put(key, data)

        assert not probe_conditional_writes(Racy(str(tmp_path)), "probe")

    def test_sees_a_store_that_refuses_the_condition(self, tmp_path: Path):
        class Refusing(LocalStore):
            def create(self, key: str, data: bytes | bytearray | memoryview) -> None:
                raise StorageError("501 NotImplemented")

        assert not probe_conditional_writes(Refusing(str(tmp_path)), "probe")
        assert list(Refusing(str(tmp_path)).list()) == []

    def test_does_not_take_a_failing_store_for_one_that_refuses(self, tmp_path: Path):
        class Failing(LocalStore):
            num_lost = 0

            def create(self, key: str, data: bytes | bytearray | memoryview) -> None:
                super().create(key, data) if not self.exists(key) else self._lose()

            def _lose(self) -> None:
                self.num_lost += 1
                raise StoreUnavailableError("503 SlowDown")

        store = Failing(str(tmp_path))
        with pytest.raises(StoreUnavailableError, match=r"cannot tell .*: 503 SlowDown"):
            probe_conditional_writes(store, "probe")
        assert store.num_lost > 0
        assert list(store.list()) == []

    def test_tries_again_where_a_request_got_lost(self, tmp_path: Path):
        class Flaky(LocalStore):
            num_late = 0

            def create(self, key: str, data: bytes | bytearray | memoryview) -> None:
                self.num_late += data == b"late"
                if data == b"late" and self.num_late == 1:
                    raise StoreUnavailableError("connection reset")
                super().create(key, data)

        store = Flaky(str(tmp_path))
        assert probe_conditional_writes(store, "probe")
        assert store.num_late == 2

    def test_names_the_fault_of_a_store_that_cannot_be_written(self, tmp_path: Path):
        class ReadOnly(LocalStore):
            def create(self, key: str, data: bytes | bytearray | memoryview) -> None:
                raise ObjectForbiddenError("read only")

            def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
                raise ObjectForbiddenError("read only")

        with pytest.raises(ObjectForbiddenError, match="read only"):
            probe_conditional_writes(ReadOnly(str(tmp_path)), "probe")


class TestS3Errors:
    @pytest.fixture
    def options(self, s3_server: str) -> StorageOptions:
        return StorageOptions(endpoint_url=s3_server)

    def test_wrong_secret(
        self, s3_bucket_url: str, options: StorageOptions, monkeypatch: pytest.MonkeyPatch
    ):
        open_store(s3_bucket_url, options).put("k", b"v")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
        store = open_store(s3_bucket_url, options)
        calls = (
            lambda: store.read("k"),
            lambda: store.read("odd//k"),
            lambda: store.head("k"),
            lambda: store.read_range("k", 0, 1),
            lambda: store.put("k", b""),
            lambda: store.create("j", b""),
            lambda: list(store.list()),
            lambda: store.delete(["k"]),
            lambda: store.open_seekable("k"),
        )
        for call in calls:
            with pytest.raises(ObjectForbiddenError, match="access denied") as caught:
                call()
            message = str(caught.value)
            assert s3_bucket_url in message
            assert "\n" not in message
            assert os.environ["AWS_ACCESS_KEY_ID"] not in message
            assert "not-the-secret" not in message
        # Of the credentials, not of the object.
        assert [type(data) for _, data in store.read_many(["k"])] == [CredentialsError]
        with pytest.raises(CredentialsError):
            store.head("k")

    def test_missing_bucket(self, options: StorageOptions):
        store = open_store("s3://no-such-bucket/x", options)
        for call in (lambda: store.read("k"), lambda: list(store.list())):
            with pytest.raises(ObjectNotFoundError, match="no bucket 'no-such-bucket'"):
                call()
        assert store.head("k") is None
        for open_ in (
            lambda: open_store(store.url, options, create=True),
            lambda: open_input(store.url, options),
        ):
            with pytest.raises(UserError, match="no bucket 'no-such-bucket'"):
                open_()

    def test_missing_credentials_are_told_at_once(self, monkeypatch: pytest.MonkeyPatch):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        # An address of the documentation range: packets to it vanish.
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://192.0.2.1/")
        start = time.monotonic()
        with pytest.raises(UserError, match="no credentials") as caught:
            open_store("s3://bucket/x")
        assert time.monotonic() - start < 6
        assert "\n" not in str(caught.value)
        assert open_store("s3://bucket/x", StorageOptions(anonymous=True)).url == "s3://bucket/x"

    def test_wrong_profile(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
        with pytest.raises(UserError, match="no-such-profile"):
            open_store("s3://bucket/x")

    def test_nobody_listens(self, aws_environment: None, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("pipeline.storage.s3_clients._MAX_RETRIES", 1)
        store = open_store("s3://b/x", StorageOptions(endpoint_url="http://127.0.0.1:1"))
        for call in (
            lambda: store.read("k"),
            lambda: store.put("k", b""),
            lambda: list(store.list()),
        ):
            with pytest.raises(StoreUnavailableError, match="s3://b/x") as caught:
                call()
            assert "\n" not in str(caught.value)

    def test_environment_travels_with_the_store(
        self, s3_bucket_url: str, monkeypatch: pytest.MonkeyPatch
    ):
        store = open_store(s3_bucket_url)
        store.put("k", b"v")
        data = pickle.dumps(store)
        assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in data
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        assert pickle.loads(data).read("k") == b"v"  # noqa: S301 - our own bytes

    def test_endpoint_of_the_profile(
        self,
        s3_server: str,
        s3_bucket_url: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        config = tmp_path / "config"
        config.write_text(f"[profile p]\nendpoint_url = {s3_server}\nregion = us-east-1\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
        monkeypatch.setenv("AWS_PROFILE", "p")
        credentials = tmp_path / "credentials"
        credentials.write_text(
            f"[p]\naws_access_key_id={os.environ['AWS_ACCESS_KEY_ID']}\n"
            f"aws_secret_access_key={os.environ['AWS_SECRET_ACCESS_KEY']}\n"
        )
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        store = open_store(s3_bucket_url)
        store.put("k", b"v")
        assert [info.key for info in store.list()] == ["k"]


class FlakyServer:
    """Answers 503 to the first requests for each path, then 200."""

    def __init__(self, num_failures: int) -> None:
        counts: dict[str, int] = {}

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                counts[self.path] = counts.get(self.path, 0) + 1
                if counts[self.path] <= num_failures:
                    self.send_error(503)
                    return
                body = b"at last"
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
                self.send_header("ETag", '"e"')
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.counts = counts
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "FlakyServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class TestRetries:
    @pytest.mark.parametrize("key", ["k", "odd//k"])
    def test_reads_outlive_a_few_503s(self, aws_environment: None, key: str):
        with FlakyServer(num_failures=2) as server:
            store = open_store("s3://b/x", StorageOptions(endpoint_url=server.url, anonymous=True))
            assert store.read(key) == b"at last"
            assert list(server.counts.values()) == [3]

    def test_reads_end(self, aws_environment: None, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("pipeline.storage.s3_clients._MAX_RETRIES", 2)
        with FlakyServer(num_failures=1000) as server:
            store = open_store("s3://b/x", StorageOptions(endpoint_url=server.url, anonymous=True))
            with pytest.raises(StoreUnavailableError, match="503"):
                store.read("k")


class TestOpening:
    @pytest.mark.parametrize(
        "url",
        [
            "http://host/x",
            "https://user:secret@host/x",
            "gs://bucket/x",
            "s3a://bucket/x",
            "zip://a.jpg::s3://bucket/a.zip",
            "simplecache::s3://bucket/x",
            "s3://",
            "s3:///x",
            "s3:",
            "s3:/",
            "~nobody-of-this-name/x",
            "x" * 5000,
            "x/" * 2500,
            "s3://key:secret@bucket/x",
            "file://host/x",
            "file://x",
            "",
            "a\0b",
        ],
    )
    def test_refuses_other_urls_in_one_line(self, url: str):
        for open_ in (open_store, open_input):
            with pytest.raises(UserError) as caught:
                open_(url)
            assert "\n" not in str(caught.value)
            assert "secret" not in str(caught.value)
            assert len(str(caught.value)) < 500
            assert url[:3] != "s3:" or "not a bucket name" in str(caught.value)

    @pytest.mark.parametrize(
        "endpoint", ["host:9000", "ftp://host", "http://", "https://key:secret@host"]
    )
    def test_refuses_other_endpoints(self, endpoint: str):
        with pytest.raises(UserError, match="must look like") as caught:
            open_store("s3://bucket/x", StorageOptions(endpoint_url=endpoint))
        assert "secret" not in str(caught.value)

    def test_local_forms_are_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        folder = tmp_path / "a b%20c"
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HOME", str(tmp_path))
        for url in (str(folder), f"{folder}/", folder.as_uri(), ".", "../a b%20c", "~/a b%20c"):
            assert open_store(url).url == str(folder)

    def test_missing_folder(self, tmp_path: Path):
        missing = tmp_path / "x" / "y"
        with pytest.raises(UserError, match="no such folder"):
            open_store(str(missing))
        assert open_store(str(missing), create=True).url == str(missing)
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(UserError, match="it is a file"):
            open_store(str(tmp_path / "file"))
        os.mkfifo(tmp_path / "pipe")
        for open_ in (open_store, open_input):
            with pytest.raises(UserError, match="not a folder"):
                open_(str(tmp_path / "pipe"))
        with pytest.raises(UserError, match="cannot make the folder"):
            open_store(str(tmp_path / "file" / "below"), create=True)

    def test_open_input(self, request: pytest.FixtureRequest, tmp_path: Path, store: Store):
        for key in ("d/a.jpg", "d/b[1].jpg", "d/e/c.jpg"):
            store.put(key, b"")
        options = store.options

        def found(url: str) -> list[str]:
            opened, pattern = open_input(url, options)
            return sorted(join_url(opened.url, info.key) for info in opened.glob(pattern))

        url = store.url
        assert found(url) == found(f"{url}/d") == found(f"{url}/**")
        assert found(f"{url}/d/a.jpg") == [f"{url}/d/a.jpg"]
        assert found(f"{url}/d/*.jpg") == [f"{url}/d/a.jpg", f"{url}/d/b[1].jpg"]
        assert found(f"{url}/d/**/*.jpg") == [
            f"{url}/d/a.jpg",
            f"{url}/d/b[1].jpg",
            f"{url}/d/e/c.jpg",
        ]
        if isinstance(store, LocalStore):
            assert found(f"{url}/d/b[1].jpg") == [f"{url}/d/b[1].jpg"]
            with pytest.raises(UserError, match="no such folder"):
                open_input(f"{url}/absent")

    def test_folders_named_like_globs(self, tmp_path: Path):
        for name in ("one [x]/a[1]/k.jpg", "one x/k.jpg", "a1/k.jpg", "one [x]/k.jpg"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")

        def found(pattern: str) -> list[str]:
            store, below = open_input(f"{tmp_path}/{pattern}")
            urls = [join_url(store.url, info.key) for info in store.glob(below)]
            return sorted(url.removeprefix(f"{tmp_path}/") for url in urls)

        assert found("one [x]/*.jpg") == ["one [x]/k.jpg"]
        assert found("one [x]/a[1]/*.jpg") == ["one [x]/a[1]/k.jpg"]
        assert found("one [x]/**/*.jpg") == ["one [x]/a[1]/k.jpg", "one [x]/k.jpg"]
        assert found("a[1]/*.jpg") == ["a1/k.jpg"]
        with pytest.raises(UserError, match="no such folder"):
            found("one [x]/absent")

    def test_import_is_light(self, project_root: Path):
        code = (
            "import sys, pipeline.storage;"
            "heavy = {'boto3', 'botocore', 'obstore', 's3fs', 'fsspec', 'torch', 'ray', 'numpy'};"
            "print(sorted(heavy & set(sys.modules)))"
        )
        answer = subprocess.run(
            [sys.executable, "-c", code], cwd=project_root, capture_output=True, check=True
        )
        assert answer.stdout.strip() == b"[]"


class TestNames:
    @pytest.mark.parametrize(
        ("url", "root", "pattern"),
        [
            ("/a/b", "/a/b", None),
            ("/a/b.jpg", "/a/b.jpg", None),
            ("/a/*.jpg", "/a", "*.jpg"),
            ("*.jpg", ".", "*.jpg"),
            ("a/b?/c", "a", "b?/c"),
            ("/*", "/", "*"),
            ("s3://b/a/**/*.jpg", "s3://b/a", "**/*.jpg"),
            ("s3://b/*", "s3://b", "*"),
            ("s3://b/a/x[12]/y", "s3://b/a", "x[12]/y"),
            ("file:///a/*/c", "file:///a", "*/c"),
        ],
    )
    def test_split_glob(self, url: str, root: str, pattern: str | None):
        assert split_glob(url) == (root, pattern)

    def test_split_glob_at_the_first_segment_that_is_no_name(self):
        names = {"/a/b[1]", "/a/b[1]/c?"}
        for url, expected in (
            ("/a/b[1]/c?/*.jpg", ("/a/b[1]/c?", "*.jpg")),
            ("/a/b[1]/d?/c?/k", ("/a/b[1]", "d?/c?/k")),
            ("/a/b[1]/k", ("/a/b[1]/k", None)),
        ):
            assert split_glob(url, names.__contains__) == expected

    @pytest.mark.parametrize(
        ("pattern", "matches", "differs"),
        [
            ("*.jpg", ["a.jpg", ".jpg"], ["a/b.jpg", "a.jpgx", "ajpg"]),
            ("**/*.jpg", ["a.jpg", "a/b.jpg", "a/b/c.jpg"], ["a/b.png"]),
            ("a/**", ["a/b", "a/b/c"], ["a", "ab/c"]),
            ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["a/xb", "ab"]),
            ("a?c", ["abc", "a\nc"], ["a/c", "ac"]),
            ("[a-c]/[!x]", ["b/y"], ["d/y", "b/x", "b//"]),
            ("[]]x[[]", ["]x["], ["x"]),
            ("a[1", ["a[1"], ["a1"]),
            ("a.b", ["a.b"], ["axb"]),
            ("[!]]", ["a"], ["]", "/"]),
        ],
    )
    def test_compile_glob(self, pattern: str, matches: list[str], differs: list[str]):
        expression = compile_glob(pattern)
        assert [key for key in matches if not expression.fullmatch(key)] == []
        assert [key for key in differs if expression.fullmatch(key)] == []

    @given(st.text("ab[]!-*?.^\\&|~", max_size=8), st.text("ab[]!-*?.^\\&|~", max_size=6))
    def test_compile_glob_agrees_with_fnmatch(self, pattern: str, name: str):
        if pattern != "**":
            assert bool(compile_glob(pattern).fullmatch(name)) == fnmatchcase(name, pattern)

    def test_hostile_globs_take_no_time(self):
        started = time.process_time()
        assert compile_glob("*a" * 20 + "b").fullmatch("a" * 200) is None
        assert compile_glob("**/" * 20 + "b").fullmatch("a/" * 200) is None
        assert time.process_time() - started < 2

    @given(st.binary())
    def test_escape_is_reversible_and_clean(self, raw: bytes):
        escaped = escape_path(raw)
        assert os.fsencode(unescape_path(escaped)) == raw
        assert escaped == escape_path(os.fsdecode(raw))
        escaped.encode()
        assert not re.search(r"[\x00-\x1f\x7f-\x9f]|//", escaped)

    @given(st.text(st.characters(codec="utf-8")))
    def test_escape_of_text_is_reversible(self, raw: str):
        assert unescape_path(escape_path(raw)) == raw

    def test_escape_keeps_ordinary_names(self):
        for name in ("a/b c.jpg", "ü/漢.mp4", "back\\slash", "#?&+"):
            assert escape_path(name) == name
        assert escape_path("100%/\n") == "100%25/%0A"
        assert escape_path(b"\xff.jpg") == "%FF.jpg"
        assert escape_path("a//b") == "a/%2Fb"
        assert escape_path("a\x9b2J\x85\xa0.jpg") == "a%C2%9B2J%C2%85\xa0.jpg"
        assert unescape_path("a%C2%9B2J%C2%85\xa0.jpg") == "a\x9b2J\x85\xa0.jpg"
        for bad in ("%", "%2", "%zz"):
            with pytest.raises(InputError, match="malformed"):
                unescape_path(bad)
        with pytest.raises(InputError, match="not a file name"):
            escape_path("\ud800")

    def test_safe_relative(self):
        for good in ("a", "a/b.jpg", "...", "a/..b", ".hidden", "%2E%2E/x"):
            assert safe_relative(good) == good
        for bad in ("", "/a", "..", "a/../b", "./a", "a/.", "a//b", "a/", "a\0b"):
            with pytest.raises(InputError) as caught:
                safe_relative(bad)
            assert caught.value.kind == "unsupported"

    def test_join_url(self):
        assert join_url("s3://b/a/", "c d", "e") == "s3://b/a/c d/e"
        assert join_url("/", "a") == "/a"
        assert join_url("/x", "a%") == "/x/a%"
        assert join_url("file:///x", "a%") == "file:///x/a%25"


def test_no_server_outlives_its_starter(project_root: Path, tmp_path: Path):
    code = (
        "import time\n"
        "from tests.s3_server import run_s3_server\n"
        "with run_s3_server() as url:\n"
        "    print(url, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=project_root,
        stdout=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as starter:
        assert starter.stdout is not None
        port = int(starter.stdout.readline().decode().strip().rpartition(":")[2])
        socket.create_connection(("127.0.0.1", port)).close()
        starter.kill()
    give_up = time.monotonic() + 10
    while time.monotonic() < give_up:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    pytest.fail("the server is still there")


@pytest.mark.parametrize("there", [True, False])
def test_a_bundle_of_certificates_that_cannot_be_read_is_named(monkeypatch, tmp_path, there):
    bundle = tmp_path / "ca.pem"
    if there:
        bundle.write_text("no certificate")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://127.0.0.1:1")
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    with pytest.raises(UserError, match=f"AWS_CA_BUNDLE={bundle}: no certificates can be read"):
        list(open_store("s3://bucket/x").list())
