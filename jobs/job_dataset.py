"""A finished job as a data set: its frames from the archive, with what the model said as labels.

So a small model is trained on what a large one annotated. Frames are decoded as the job decoded
them. Read in order, a whole shard is decoded at a time; out of order, just the frame asked for.
"""

import os
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.generations import History, read_part_table, shards_of
from jobs.plan import Plan, PlanPart
from jobs.record import read_job
from pipeline.decode import decode_shard
from pipeline.encode import decode_class_ids, decode_depth, resize_class_ids
from pipeline.errors import DAMAGE, JobError, ObjectNotFoundError, UserError
from pipeline.layout import Generation
from pipeline.pinned import DamagedError, read_pinned
from pipeline.records import CommitRecord, DataFile, ShardSpec, Slice, UInt8Array
from pipeline.sinks.parquet import read_rows
from pipeline.storage import StorageOptions, Store, open_store
from segformer3d.config import DepthCodec
from segformer3d.datasets import IDENTITY_GROUPS, DatasetError, DepthKind, Sample
from segformer3d.draw import resize_depth
from segformer3d.labels import CLASS_NAMES

# A reader that moves on by so many frames at most reads in order; several ranks take turns.
_NEAR = 8
_LABEL_COLUMNS = ["asset", "frame_index", "status", "class_ids", "depth"]

Rows = list[dict[str, Any]]


class _Place(NamedTuple):
    """Where a shard's plan lies."""

    part: PlanPart
    shard_id: int


class _Data(NamedTuple):
    """A shard's data object, and what its record says of it."""

    key: str
    file: DataFile


class JobDataset:
    """The good frames of a finished job, in the order of its plan.

    Images are as the model saw them, at its input size; class ids have that size too, and depth
    is resized to it from the H / 4 grid. May be pickled, and used after a fork; by one thread.

    Attributes:
        groups: Every class stands for itself.
        depth_kind: What the job's depth codec says.
    """

    groups = IDENTITY_GROUPS

    def __init__(
        self, url: str, *, min_confidence: float = 0.0, storage: StorageOptions | None = None
    ) -> None:
        """Read the job's records.

        Args:
            url: The job's URI.
            min_confidence: Leave out frames whose `confidence_mean` is below.
            storage: How to reach the job; by default as the environment says.

        Raises:
            UserError: There is no finished job, it knows other classes, or no frame is left.
            JobError: Its records make no sense.
        """
        self._url = url
        self._storage = storage or StorageOptions()
        self._store: tuple[int, Store] | None = None
        store = self._open()
        record = read_job(store)
        spec = record.job_spec()
        self._archive, self._limits = spec.input.storage.options(), spec.limits.limits()
        self._codec = DepthCodec.from_dict(record.depth_codec) if record.depth_codec else None
        self.depth_kind: DepthKind = self._codec.kind if self._codec else "none"
        if record.labels and tuple(record.labels) != CLASS_NAMES:
            raise UserError(f"{url}: its classes are not the {len(CLASS_NAMES)} of Cityscapes")
        self._shards, self._data, self._kept = self._index(store, min_confidence)
        self._ends = list(accumulate(len(kept) for kept in self._kept))
        if not len(self):
            raise UserError(f"{url}: no good frame with a confidence of {min_confidence:g} or more")
        # Caches of one entry: (plan part, its table), (shard, its rows), (shard, its frames).
        self._part: tuple[str, pa.Table] | None = None
        self._rows: tuple[int, Rows] | None = None
        self._frames: tuple[int, dict[tuple[str, int], UInt8Array]] | None = None
        self._last = -1

    def __len__(self) -> int:
        """Number of good frames."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Sample:
        """Read one frame and its labels.

        Raises:
            DatasetError: The archive no longer gives the frame, or its labels are damaged.
            JobError: The plan is not what was committed.
            StorageError: An object of the job cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        shard_id = bisect_right(self._ends, index)
        start = self._ends[shard_id - 1] if shard_id else 0
        row = self._labels(shard_id)[int(self._kept[shard_id][index - start])]
        in_order = 0 < index - self._last <= _NEAR
        self._last = index
        image = self._image(shard_id, (row["asset"], row["frame_index"]), in_order=in_order)
        try:
            return self._sample(row, image)
        except ValueError as error:
            key = self._data[shard_id].key
            raise DatasetError(
                f"{key}: {row['asset']}: {error}; see `segformer3d verify`"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what only saves time."""
        return {
            **self.__dict__,
            "_store": None,
            "_part": None,
            "_rows": None,
            "_frames": None,
            "_last": -1,
        }

    def _open(self) -> Store:
        """The job's store; a fork opens its own, for clients must not cross one."""
        if self._store is None or self._store[0] != os.getpid():
            self._store = os.getpid(), open_store(self._url, self._storage)
        return self._store[1]

    def _index(
        self, store: Store, min_confidence: float
    ) -> tuple[list[_Place], list[_Data], list[npt.NDArray[np.intp]]]:
        """Give each shard that counts, its data object, and which of its rows to keep."""
        history = History.load(store)
        if not history.views:
            raise UserError(f"{self._url}: not planned yet; finish it with `segformer3d resume`")
        if not history.is_complete:
            done = f"{history.num_done} of {history.num_shards} shards are done"
            raise UserError(f"{self._url}: {done}; finish it with `segformer3d resume`")
        places: list[_Place] = []
        data: list[_Data] = []
        kept: list[npt.NDArray[np.intp]] = []
        for view in history.views:
            for record in sorted(view.records, key=lambda record: record.shard_id):
                places.append(_Place(_part_of(view.plan, record.shard_id), record.shard_id))
                data.append(self._data_of(view.generation, record))
                rows = np.empty(0, np.intp)
                if record.num_ok:
                    rows = _good_rows(store, data[-1].key, record, min_confidence)
                kept.append(rows)
        return places, data, kept

    def _data_of(self, generation: Generation, record: CommitRecord) -> _Data:
        if len(record.files) != 1:
            raise JobError(f"{self._url}: shard {record.shard_id} has {len(record.files)} objects")
        (file,) = record.files
        return _Data(f"{generation.prefix}{file.path}", file)

    def _labels(self, shard_id: int) -> Rows:
        if self._rows is None or self._rows[0] != shard_id:
            key, file = self._data[shard_id]
            try:
                data = read_pinned(self._open(), key, file.sha256)
                self._rows = shard_id, read_rows(data, _LABEL_COLUMNS)
            except DamagedError as error:
                raise DatasetError(f"{error}; see `segformer3d verify`") from error
            except ValueError as error:
                raise DatasetError(f"{key}: {error}; see `segformer3d verify`") from error
        return self._rows[1]

    def _image(self, shard_id: int, frame: tuple[str, int], *, in_order: bool) -> UInt8Array:
        """Give one frame at the model's input size."""
        if self._frames is not None and self._frames[0] == shard_id and frame in self._frames[1]:
            return self._frames[1][frame]
        spec = self._shard(shard_id)
        if not in_order:
            return self._decoded(_only(spec, {frame}), needed=frame)[frame]
        rows = self._labels(shard_id)
        wanted = {(rows[i]["asset"], rows[i]["frame_index"]) for i in self._kept[shard_id]}
        frames = self._decoded(_only(spec, wanted), needed=frame)
        self._frames = shard_id, frames
        return frames[frame]

    def _decoded(
        self, spec: ShardSpec, needed: tuple[str, int]
    ) -> dict[tuple[str, int], UInt8Array]:
        """Decode frames; those that cannot be had are missing, but for the one needed now."""
        decoded = decode_shard(spec, self._archive, self._limits)
        frames: dict[tuple[str, int], UInt8Array] = {}
        for record in decoded.frames:
            key = record.asset, record.frame_index
            if record.error_kind is None:
                frames[key] = decoded.pixels[len(frames)]
            elif key == needed:
                name = f"{spec.root}/{record.asset}, frame {record.frame_index}"
                raise DatasetError(f"{name}: the archive no longer gives it: {record.error}")
        if needed not in frames:
            message = (
                f"shard {spec.shard_id} has a row of {needed[0]}, frame {needed[1]}, unplanned"
            )
            raise DatasetError(f"{self._url}: {message}; see `segformer3d verify`")
        return frames

    def _shard(self, place: int) -> ShardSpec:
        """The shard at a place of the list."""
        part, shard_id = self._shards[place]
        if self._part is None or self._part[0] != part.key:
            self._part = part.key, read_part_table(self._open(), part)
        (shard,) = shards_of(part, self._part[1].slice(shard_id - part.first_shard, 1))
        return shard

    def _sample(self, row: dict[str, Any], image: UInt8Array) -> Sample:
        height, width = image.shape[:2]
        ids = depth = None
        if row["class_ids"] is not None:
            # A job may keep them at the asset's size; a sample has one size.
            ids = resize_class_ids(decode_class_ids(row["class_ids"]["bytes"]), (width, height))
        if row["depth"] is not None and self._codec is not None:
            codes = decode_depth(row["depth"]["bytes"])
            depth = resize_depth(self._codec.decode(codes), (width, height))
        name = str(PurePosixPath(row["asset"], f"{row['frame_index']:06d}"))
        return Sample(name, np.array(image), ids, depth)


def _part_of(plan: Plan, shard_id: int) -> PlanPart:
    firsts = [part.first_shard for part in plan.parts]
    return plan.parts[bisect_right(firsts, shard_id) - 1]


def _good_rows(
    store: Store, key: str, record: CommitRecord, min_confidence: float
) -> npt.NDArray[np.intp]:
    """Places of the good rows of a data object; only two columns of it are read."""
    try:
        with store.open_seekable(key) as file:
            parquet = pq.ParquetFile(pa.PythonFile(file))
            if parquet.metadata.num_rows != record.num_rows:
                raise ValueError(f"{parquet.metadata.num_rows} rows, {record.num_rows} committed")
            table = parquet.read(columns=["status", "confidence_mean"])
    except (pa.ArrowException, *DAMAGE, ObjectNotFoundError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: {reason}; see `segformer3d verify`") from None
    good = np.array([status == "ok" for status in table["status"].to_pylist()])
    if len(good) != record.num_rows or int(np.count_nonzero(good)) != record.num_ok:
        raise UserError(f"{key}: other rows than were committed; see `segformer3d verify`")
    if min_confidence > 0:
        confidence = table["confidence_mean"].to_pylist()
        good &= np.array([value is not None and value >= min_confidence for value in confidence])
    return np.flatnonzero(good)


def _only(spec: ShardSpec, wanted: set[tuple[str, int]]) -> ShardSpec:
    """Give the shard with nothing but some of its frames."""
    parts = [_slice_of(part, wanted) for part in spec.slices]
    return replace(spec, slices=tuple(part for part in parts if part is not None))


def _slice_of(part: Slice, wanted: set[tuple[str, int]]) -> Slice | None:
    places = [i for i, index in enumerate(part.frame_index) if (part.asset, index) in wanted]
    return part.take(places) if places else None
