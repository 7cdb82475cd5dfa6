"""From a URL to a store."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from glob import escape as escape_glob
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from pipeline.errors import UserError
from pipeline.storage.base import StorageOptions, Store
from pipeline.storage.local import LocalStore
from pipeline.storage.paths import printable, split_glob
from pipeline.urls import (
    STORE_SCHEMES,
    STORES,
    WEB_SCHEMES,
    check_endpoint,
    check_file_url,
    check_scheme,
)

if TYPE_CHECKING:
    from pipeline.storage.s3 import S3Store

_NO_BUCKET_NAME = "not a bucket name: an S3 URL looks like s3://bucket/prefix"
_MAX_SHOWN_CHARS = 200


def open_store(url: str, options: StorageOptions | None = None, *, create: bool = False) -> Store:
    """Open the store at ``url``.

    Args:
        url: A local folder, ``file:///folder`` or ``s3://bucket/prefix``.
        options: How to reach S3. What the environment says of endpoint and region is taken here
            and travels with the store, so that workers see what the driver saw.
        create: For a store that will be written: makes the local folder, checks the bucket.

    Raises:
        UserError: For any other URL, a missing folder or bucket, or missing credentials.
    """
    path = local_path(url)
    if path is not None:
        return _open_local(path, create=create)
    store = _open_s3(url, options)
    if create:
        store.require_bucket()
    return store


def open_input(url: str, options: StorageOptions | None = None) -> tuple[Store, str | None]:
    """Open what a user names as input: a folder, a single file, or a glob.

    Returns:
        The store and a pattern for ``compile_glob``, None meaning everything.

    Raises:
        UserError: If there is nothing there, or as ``open_store``.
    """
    path = local_path(url)
    if path is not None:
        return _open_local_input(path)
    root, pattern = split_glob(url)
    store = _open_s3(root, options)
    store.require_bucket()
    parent, _, name = root.rpartition("/")
    if pattern is None and name and parent != "s3:/":
        folder = _open_s3(parent, options)
        if folder.exists(name):
            return folder, escape_glob(name)
    return store, pattern


def read_file(url: str, options: StorageOptions | None = None, *, max_web_bytes: int) -> bytes:
    """Read the one file that a user names: local, in S3, or on the web.

    Args:
        url: A path, ``file:///path``, ``s3://bucket/key`` or ``https://host/path``.
        options: How to reach S3.
        max_web_bytes: Most that is taken from the web.

    Raises:
        UserError: For any other URL.
        StorageError: It is not there, or cannot be read.
    """
    check_file_url(url)
    if url.partition("://")[0] in WEB_SCHEMES:
        from pipeline.web import read_web  # TLS and HTTP cost decoding children 20 ms

        return read_web(url, max_web_bytes)
    path = local_path(url)
    if path is not None:
        return LocalStore(str(Path(path).parent)).read(Path(path).name)
    folder, _, name = url.rpartition("/")
    return open_store(folder, options).read(name)


def resolve_options(options: StorageOptions) -> StorageOptions:
    """Fill endpoint and region from the environment."""
    endpoint_url = (
        options.endpoint_url
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
    )
    region = options.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if endpoint_url:
        check_endpoint(endpoint_url)
    return replace(options, endpoint_url=endpoint_url or None, region=region or None)


def local_path(url: str) -> str | None:
    """The absolute path that a local URL names, None for S3.

    Raises:
        UserError: For any other URL.
    """
    scheme = check_scheme(url, STORE_SCHEMES, STORES)
    rest = url.partition("://")[2]
    if scheme is None:
        if not url or "\0" in url:
            raise UserError(f"not a storage URL: use {STORES}")
        if url in {"s3:", "s3:/"}:
            raise UserError(_NO_BUCKET_NAME)
        try:
            return str(Path(url).expanduser().absolute())
        except RuntimeError as error:
            message = f"cannot open {_shown(url)}: no such user, or one without a home folder"
            raise UserError(message) from error
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host not in {"", "localhost"} or not slash:
            raise UserError("a file URL has three slashes: file:///path")
        return str(Path(unquote(slash + path, errors="surrogateescape")))
    bucket = rest.partition("/")[0]
    if not bucket or set(bucket) & set("@:?#% *["):
        raise UserError(_NO_BUCKET_NAME)
    return None


def _open_s3(url: str, options: StorageOptions | None) -> "S3Store":
    from pipeline.storage.s3 import S3Store  # boto3 and obstore cost 0.3 s

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    store = S3Store(bucket, prefix.rstrip("/"), resolve_options(options or StorageOptions()))
    store.connect()
    return store


def _open_local(path: str, *, create: bool) -> LocalStore:
    folder = Path(os.path.normpath(path))
    if create:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot make the folder {_shown(str(folder))}: {error.strerror}"
            raise UserError(message) from error
    with _users_errors(path):
        if not folder.is_dir():
            reason = "it is a file" if folder.is_file() else "not a folder"
            reason = reason if folder.exists() else "no such folder"
            raise UserError(f"cannot open {folder}: {reason}")
    return LocalStore(str(folder))


def _open_local_input(path: str) -> tuple[Store, str | None]:
    with _users_errors(path):
        if Path(path).is_file():
            return _open_local(str(Path(path).parent), create=False), escape_glob(Path(path).name)
        if Path(path).exists():
            return _open_local(path, create=False), None
        root, pattern = split_glob(path, lambda folder: Path(folder).is_dir())
    return _open_local(root, create=False), pattern


@contextmanager
def _users_errors(path: str) -> Iterator[None]:
    """What asking about a path raises, such as a name that is too long, is the user's mistake."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot open {_shown(path)}: {error.strerror or error}") from error


def _shown(path: str) -> str:
    shown = printable(path)
    return shown if len(shown) <= _MAX_SHOWN_CHARS else f"{shown[:_MAX_SHOWN_CHARS]}..."
