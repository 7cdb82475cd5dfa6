"""The PNG tree that mirrors the archive: class ids, colours and depth at the asset's own size.

It is made after the commit, from the winning Parquet object, so that writing it again is harmless.
"""

from collections.abc import Container, Iterable, Iterator
from itertools import islice
from typing import Any

from pipeline.encode import (
    decode_class_ids,
    decode_depth,
    encode_png,
    is_same_png,
    resize_class_ids,
    resize_depth_codes,
)
from pipeline.errors import ObjectNotFoundError, StorageError
from pipeline.layout import PNG_CLASS_SUFFIXES, PNG_DEPTH_SUFFIX, Generation, png_stem
from pipeline.records import UInt8Array, UInt16Array
from pipeline.sinks.parquet import read_rows
from pipeline.storage import Store
from segformer3d.draw import colorize_classes

_COMPARED_AT_A_TIME = 48
_COLUMNS = ["asset", "frame_index", "pts_s", "width", "height", "status", "class_ids", "depth"]


def write_png_tree(
    store: Store, data: bytes, *, anew: bool, newer: Generation, only: Container[str] | None = None
) -> int:
    """Write the PNGs of every good row of a shard.

    Args:
        store: The job's store.
        data: Bytes of the shard's winning Parquet object.
        anew: Whether an older generation may have made PNGs of its frames: those of frames that
            are errors now are deleted.
        newer: A generation that may decide such frames otherwise: none is deleted once it is
            planned.
        only: Keys to see to; all unless told.

    Returns:
        How many PNGs were written or deleted.
    """
    written = 0
    stale: list[str] = []
    for key, png in _pngs(data, anew=anew):
        if only is not None and key not in only:
            continue
        if png is None:
            stale.append(key)
        else:
            store.put(key, png)
            written += 1
    # Looked at last: a newer generation writes PNGs only after its plan is there, so whatever lies
    # there now is no newer one's. What comes within the moment until the deletion may be lost to
    # it, and only if a whole shard was planned, annotated and published in that moment, as markers
    # are written after this and a retry waits for all of them. `verify` would tell.
    if not stale or store.exists(newer.plan_key):
        return written
    store.delete(stale)
    return written + len(stale)


def compare_png_tree(store: Store, data: bytes, *, anew: bool) -> Iterator[tuple[str, bool]]:
    """Compare the PNGs of a shard with what its data says.

    Args:
        store: The job's store.
        data: Bytes of the shard's winning Parquet object.
        anew: As for ``write_png_tree``: then an error's frame must have none.

    Yields:
        The key of every PNG, and whether it is what it should be, or absent if it should be.

    Raises:
        StorageError: One cannot be read.
    """
    made = _pngs(data, anew=anew)
    while expected := dict(islice(made, _COMPARED_AT_A_TIME)):
        for key, found in store.read_many(expected):
            wanted = expected[key]
            if isinstance(found, ObjectNotFoundError):
                yield key, wanted is None
            elif isinstance(found, StorageError):
                raise found
            else:
                yield key, wanted is not None and is_same_png(found, wanted)


def _pngs(data: bytes, *, anew: bool) -> Iterator[tuple[str, bytes | None]]:
    """Keys and bytes of a shard's PNGs; if made anew, also keys that an error must not have."""
    for row in read_rows(data, _COLUMNS):
        asset, index = row["asset"], row["frame_index"]
        if row["status"] == "ok":
            stem = png_stem(asset, index, is_video=row["pts_s"] is not None)
            for suffix, picture in _pictures(row).items():
                yield f"{stem}{suffix}", encode_png(picture)
        elif anew and index >= 0:
            # A file that is gone does not say any more which of the two it was.
            kinds = (False, True) if row["pts_s"] is None else (True,)
            yield from dict.fromkeys(png_keys(asset, index, kinds)).items()


def png_keys(
    asset: str, frame_index: int, are_videos: Iterable[bool] = (False, True)
) -> Iterator[str]:
    """Keys of all PNGs that a frame may have, if its asset is an image, a video, or either."""
    for is_video in are_videos:
        stem = png_stem(asset, frame_index, is_video=is_video)
        yield from (f"{stem}{suffix}" for suffix in (*PNG_CLASS_SUFFIXES, PNG_DEPTH_SUFFIX))


def _pictures(row: dict[str, Any]) -> dict[str, UInt8Array | UInt16Array]:
    size = (row["width"], row["height"])
    pictures: dict[str, UInt8Array | UInt16Array] = {}
    if row["class_ids"] is not None:
        class_ids = resize_class_ids(decode_class_ids(row["class_ids"]["bytes"]), size)
        painted = class_ids, colorize_classes(class_ids)
        pictures.update(zip(PNG_CLASS_SUFFIXES, painted, strict=True))
    if row["depth"] is not None:
        pictures[PNG_DEPTH_SUFFIX] = resize_depth_codes(decode_depth(row["depth"]["bytes"]), size)
    return pictures
