"""The PNG tree that mirrors the archive: class ids, colours and depth at the asset's own size.

It is made after the commit, from the winning Parquet object, so that writing it again is harmless.
"""

from typing import Any

from pipeline.encode import (
    decode_class_ids,
    decode_depth,
    encode_png,
    resize_class_ids,
    resize_depth_codes,
)
from pipeline.layout import png_stem
from pipeline.records import UInt8Array, UInt16Array
from pipeline.sinks.parquet import read_rows
from pipeline.storage import Store
from segformer3d.draw import colorize_classes

_COLUMNS = ["asset", "frame_index", "pts_s", "width", "height", "status", "class_ids", "depth"]


def write_png_tree(store: Store, data: bytes) -> int:
    """Write the PNGs of every good row of a shard.

    Args:
        store: The job's store.
        data: Bytes of the shard's winning Parquet object.

    Returns:
        How many PNGs were written.
    """
    written = 0
    for row in read_rows(data, _COLUMNS):
        if row["status"] != "ok":
            continue
        stem = png_stem(row["asset"], row["frame_index"], is_video=row["pts_s"] is not None)
        for suffix, picture in _pictures(row).items():
            store.put(f"{stem}{suffix}", encode_png(picture))
            written += 1
    return written


def _pictures(row: dict[str, Any]) -> dict[str, UInt8Array | UInt16Array]:
    size = (row["width"], row["height"])
    pictures: dict[str, UInt8Array | UInt16Array] = {}
    if row["class_ids"] is not None:
        class_ids = resize_class_ids(decode_class_ids(row["class_ids"]["bytes"]), size)
        pictures["_labelTrainIds.png"] = class_ids
        pictures["_color.png"] = colorize_classes(class_ids)
    if row["depth"] is not None:
        pictures["_depth.png"] = resize_depth_codes(decode_depth(row["depth"]["bytes"]), size)
    return pictures
