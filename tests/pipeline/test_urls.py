"""Which URLs are refused, what the web is, and that no credential is shown."""

import email
import io
import socket
from urllib.error import URLError
from urllib.request import Request

import pytest

from pipeline import urls, web
from pipeline.errors import (
    ObjectNotFoundError,
    StorageError,
    StoreUnavailableError,
    UserError,
)
from pipeline.storage import read_file
from pipeline.urls import ALLOW_PRIVATE, is_public, public_addresses, redact, without_query
from pipeline.web import open_web, read_web
from tests.web_server import serve

PRIVATE = [
    "127.0.0.1",
    "127.255.0.9",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.254",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",  # noqa: S104
    "224.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "fe80::1",
    "fe80::1%lo",
    "fec0::1",
    "fc00::1",
    "fd12::1",
    "ff02::1",
    "::ffff:10.0.0.1",
    "::ffff:127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::1",
]
PUBLIC = ["8.8.8.8", "172.32.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
REFUSED = [
    "simplecache::https://host/x",
    "zip://a.jpg::s3://bucket/a.zip",
    "filecache::s3://bucket/x",
    "a::b",
    "ftp://host/x",
    "sftp://host/x",
    "ssh://host/x",
    "github://owner:repo@main/x",
    "git://x",
    "memory://x",
    "reference://x",
    "zip://x",
    "tar://x",
    "data://x",
    "gs://bucket/x",
    "s3a://bucket/x",
    "hf://owner/model/x",
    "hdfs://x",
    "generic://x",
    "HTTP+UNIX://x",
    "python://os.system",
    "\x1b[31m://x",
    "https://user:secret-word@host/x",
    "https://secret-word@host/x",
    "s3://key:secret-word@bucket/x",
    "s3://key:secret/secret-word@bucket/x",
    "https://",
    "https:///x",
    "http://host:port/x",
    "http://[::1/x",
    "https://ho st/x",
]
LOOPBACK_FORMS = [
    "http://127.0.0.1/x",
    "http://localhost/x",
    "http://2130706433/x",
    "http://0x7f.1/x",
    "http://0x7f000001/x",
    "http://0177.0.0.1/x",
    "http://127.1/x",
    "http://[::1]/x",
    "http://[::ffff:127.0.0.1]/x",
    "http://0/x",
    "http://169.254.169.254/latest/meta-data/",
    "http://[fe80::1]/x",
    "http://10.1.2.3/x",
    "https://192.168.0.1/x",
]


@pytest.fixture
def no_connection(monkeypatch):
    """Whatever is tried, nothing is connected to."""

    def refuse(*_):
        pytest.fail("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv(ALLOW_PRIVATE, raising=False)


@pytest.fixture
def loopback_is_public(monkeypatch):
    """Take 127.0.0.1, where the test's server is, for a public address; nothing else of it."""
    monkeypatch.delenv(ALLOW_PRIVATE, raising=False)
    monkeypatch.setattr(urls, "is_public", lambda address: address == "127.0.0.1")


@pytest.fixture
def server():
    with serve() as found:
        yield found


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize("url", REFUSED)
def test_refused_urls_are_refused_in_one_line_before_any_connection(no_connection, url):
    with pytest.raises(UserError) as caught:
        read_file(url, max_web_bytes=1)
    text = str(caught.value)
    assert text.isprintable()
    assert "secret-word" not in text
    assert len(text) < 300


@pytest.mark.parametrize("url", LOOPBACK_FORMS)
def test_private_hosts_are_refused_however_they_are_written(no_connection, url):
    with pytest.raises(UserError, match="no public address") as caught:
        read_file(url, max_web_bytes=1)
    assert ALLOW_PRIVATE in str(caught.value)


def test_a_name_is_judged_by_all_its_addresses(no_connection, monkeypatch):
    def resolve(*_, **__):
        return [(0, 0, 0, "", (address, 80)) for address in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(UserError, match=r"rebound\.example \(10\.0\.0\.1\) is no public"):
        read_file("http://rebound.example/x", max_web_bytes=1)


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch):
    """A name that answers otherwise the second time (DNS rebinding) is not asked twice."""
    answers = iter([[(0, 0, 0, "", ("8.8.8.8", 80))]])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: next(answers))
    tried = []

    def connect(address, *_):
        tried.append(address)
        raise OSError("not from a test")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(StoreUnavailableError, match="not from a test"):
        read_web("http://rebound.example/x", 1)
    assert tried == [("8.8.8.8", 80)]


def test_a_public_host_is_read(server, loopback_is_public):
    server.files["/a/b.bin"] = b"x" * 5000
    assert read_web(f"{server.url}/a/b.bin?sig=1", 10_000) == b"x" * 5000
    assert server.asked == ["/a/b.bin?sig=1"]
    assert not {"Authorization", "Cookie"} & set(server.headers[0])


def test_the_environment_allows_private_hosts(server, monkeypatch):
    server.files["/x"] = b"data"
    monkeypatch.setenv(ALLOW_PRIVATE, "1")
    assert read_file(f"{server.url}/x", max_web_bytes=10) == b"data"
    monkeypatch.setenv(ALLOW_PRIVATE, "0")
    with pytest.raises(UserError, match="no public address"):
        read_file(f"{server.url}/x", max_web_bytes=10)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.2:{port}/secret",
        "http://localhost.:{port}/secret",
        "http://[::1]:{port}/secret",
        "http://user:hidden@127.0.0.1:{port}/secret",
        "ftp://127.0.0.1:{port}/secret",
        "file:///etc/hostname",
        "gopher://127.0.0.1:{port}/",
    ],
)
def test_a_redirect_to_elsewhere_is_not_followed(server, loopback_is_public, monkeypatch, target):
    true_resolve = socket.getaddrinfo

    def resolve(host, *arguments, **named):
        # A name that leads to a neighbour, which no file here needs to say.
        return true_resolve("127.0.0.3" if host == "localhost." else host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    server.files["/secret"] = b"not yours"
    server.redirects["/x"] = target.format(port=server.url.rpartition(":")[2])
    with pytest.raises((UserError, StorageError)) as caught:
        read_web(f"{server.url}/x", 100)
    assert "hidden" not in str(caught.value)
    assert server.asked == ["/x"]


def test_a_redirect_within_the_public_web_is_followed(server, loopback_is_public):
    server.files["/there"] = b"data"
    server.redirects |= {"/x": "/y", "/y": f"{server.url}/there", "/round": "/round"}
    assert read_web(f"{server.url}/x", 100) == b"data"
    with pytest.raises(StorageError, match="answers 302"):
        read_web(f"{server.url}/round", 100)


@pytest.mark.parametrize(
    ("target", "is_followed"), [("http://8.8.8.8/x", False), ("https://8.8.8.8/x", True)]
)
def test_a_redirect_that_gives_up_encryption_is_not_followed(target, is_followed):
    """Asked of the opener itself: a server with a certificate that is trusted is not at hand."""
    answer = io.BytesIO()
    headers = email.message_from_string(f"Location: {target}\n\n")
    asked = []
    opener = web._opener()
    opener.open = lambda request, **_: asked.append(request.full_url) or answer
    request = Request("https://8.8.8.8/x")
    request.timeout = 1.0
    if is_followed:
        opener.error("http", request, answer, 302, "Found", headers)
    else:
        with pytest.raises(URLError, match="from https to http"):
            opener.error("http", request, answer, 302, "Found", headers)
    assert asked == [target] * is_followed
    assert answer.closed


def test_proxies_and_passwords_of_the_environment_are_not_used(
    server, loopback_is_public, monkeypatch, tmp_path
):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    server.files["/x"] = b"data"
    assert read_web(f"{server.url}/x", 10) == b"data"
    assert "Authorization" not in server.headers[0]


def test_what_the_web_lacks_or_cuts_is_told(server, loopback_is_public):
    server.files |= {"/cut": b"half", "/big": b"x" * 100}
    server.promised["/cut"] = 8
    with pytest.raises(ObjectNotFoundError, match="answers 404"):
        read_web(f"{server.url}/none?token=hidden", 10)
    with pytest.raises(StoreUnavailableError, match="ended early"):
        read_web(f"{server.url}/cut", 10)
    with pytest.raises(StorageError, match="more than 99 bytes"):
        read_web(f"{server.url}/big", 99)
    with open_web(f"{server.url}/big") as file:
        assert file.read(60) + file.read(60) + file.read(60) == b"x" * 100


def test_a_server_that_hangs_is_given_up(loopback_is_public, monkeypatch):
    monkeypatch.setattr(web, "_STALL_TIMEOUT_S", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(StoreUnavailableError, match="timed out"),
    ):
        read_web(f"http://127.0.0.1:{silent.getsockname()[1]}/x", 10)


def test_a_server_that_sends_a_byte_at_a_time_is_given_up(server, loopback_is_public, monkeypatch):
    monkeypatch.setattr(web, "_PATIENCE_S", 0.3)
    server.files["/slow"] = b"x" * 500
    server.pauses["/slow"] = 0.01
    with pytest.raises(StoreUnavailableError, match=r"slow: too slow: \d+ bytes in 0 s"):
        read_web(f"{server.url}/slow", 1000)
    monkeypatch.setattr(web, "_SLOWEST_BYTES_PER_S", 10)
    assert read_web(f"{server.url}/slow", 1000) == b"x" * 500


def test_addresses_of_a_host(monkeypatch):
    monkeypatch.setenv(ALLOW_PRIVATE, "1")
    assert public_addresses("127.0.0.1", 80) == ["127.0.0.1"]
    monkeypatch.delenv(ALLOW_PRIVATE)
    with pytest.raises(UserError, match="not a host name"):
        public_addresses(f"{'x' * 70}.example", 80)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://KEY:SECRET@bucket/x: bad", "s3://***@bucket/x: bad"),
        ("s3://AK:ab/cd+e@bucket/x", "s3://***@bucket/x"),
        ("https://user:p@ss@host/x", "https://***@host/x"),
        ("https:/user:pass@host/x", "https:/***@host/x"),
        ("see https://h/x?X-Amz-Signature=abc&y=1 there", "see https://h/x?*** there"),
        ("'http://u:s@h:1/'", "'http://***@h:1/'"),
        ("s3://bucket/me@home.jpg", "s3://bucket/me@home.jpg"),
        ("http://[::1]:9000/me@home", "http://[::1]:9000/me@home"),
        ("http://127.0.0.1:9000/me@home", "http://127.0.0.1:9000/me@home"),
        ("camvid:/data/me@home?split=val", "camvid:/data/me@home?split=val"),
        ("/home/me@home/a", "/home/me@home/a"),
    ],
)
def test_what_is_shown_has_no_credential_and_is_left_alone_otherwise(text, expected):
    assert redact(text) == expected


def test_secrets_of_the_environment_are_not_shown(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary+of/the+test")
    monkeypatch.setenv("HF_TOKEN", "short")
    assert redact("a canary+of/the+test short") == "a *** short"


def test_a_signed_url_is_recorded_without_its_signature():
    assert without_query("https://host/a.safetensors?sig=abc#x") == "https://host/a.safetensors"
    assert without_query("s3://bucket/what?.jpg") == "s3://bucket/what?.jpg"
