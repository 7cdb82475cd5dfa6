"""Storage: one small interface over a local folder and an S3 bucket.

``open_store(url)`` gives a ``Store``, which reads, lists, publishes and creates objects by keys
relative to the URL; ``create_once`` is the commit protocol's one decision. S3 clients are imported
only where an ``s3://`` URL is opened.
"""

from pipeline.storage.base import ObjectInfo, StorageOptions, Store
from pipeline.storage.commit import create_once, probe_conditional_writes
from pipeline.storage.opening import open_input, open_store, read_file
from pipeline.storage.paths import (
    compile_glob,
    escape_path,
    join_url,
    safe_relative,
    split_glob,
    unescape_path,
)
from pipeline.storage.seekable import open_window

__all__ = [
    "ObjectInfo",
    "StorageOptions",
    "Store",
    "compile_glob",
    "create_once",
    "escape_path",
    "join_url",
    "open_input",
    "open_store",
    "open_window",
    "probe_conditional_writes",
    "read_file",
    "safe_relative",
    "split_glob",
    "unescape_path",
]
