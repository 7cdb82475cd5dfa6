"""The three stages as plain callables over one-row Arrow tables: decode, annotate, publish.

None of them knows where it runs. A table without rows passes through: it stands for a shard that
somebody else has committed meanwhile, or that a draining job leaves for later.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa

from pipeline.commit import commit_attempt
from pipeline.deaths import Deaths, DecodeTally, Journal, spare
from pipeline.decode import DecodeLimits, decode_shard
from pipeline.errors import ErrorKind
from pipeline.layout import DeathPlace, Generation, cancel_key
from pipeline.records import Certainty, FrameRecord, UInt8Array, UInt16Array
from pipeline.sinks.parquet import encode_shard
from pipeline.sinks.png import write_png_tree
from pipeline.statistics import certainty_of
from pipeline.storage import StorageOptions, Store, open_store
from pipeline.tables import (
    RECEIPT_SCHEMA,
    AnnotatedShard,
    DecodedShard,
    ShardReceipt,
    shards_from_table,
)

if TYPE_CHECKING:
    from segformer3d.predictor import Predictions

    _Wait = Callable[[], Predictions | None]

_Made = TypeVar("_Made")

# How long a stage trusts its last look at the cancel marker.
_DRAIN_CHECK_S = 1.0
# What libraries below torch report of a failed device is no AcceleratorError.
_DEVICE_FAULTS = ("CUDA error", "cuDNN error", "CUDA driver error", "Triton Error [CUDA]")


_NO_MEMORY: tuple[ErrorKind, str] = ("out_of_memory", "the model does not fit into memory with it")
_NON_FINITE: tuple[ErrorKind, str] = ("non_finite", "the model's output is not finite")


@dataclass(frozen=True, kw_only=True)
class StageContext:
    """What every stage of one run needs to know.

    Attributes:
        job_url: The job's URI.
        job_storage: How to reach it.
        archive_storage: How to reach the archive.
        generation: Number of the generation being made.
        plan_id: Its plan.
        lease: Number of the driver's lease.
        metadata: Stored in the schema of every Parquet object.
        limits: Bounds of the decoder.
        write_png: Whether the PNG tree is wanted.
        class_ids_at_asset_size: Whether class ids are resolved at the asset's own size.
        depth_at_asset_size: Whether depth is resized to the asset's own size.
        micro_batch: Frames per forward pass at the most; None leaves it to the device.
        threads: CPU threads of one model; None leaves torch's default.
    """

    job_url: str
    job_storage: StorageOptions
    archive_storage: StorageOptions
    generation: int
    plan_id: str
    lease: int
    metadata: dict[str, object]
    limits: DecodeLimits
    write_png: bool = False
    class_ids_at_asset_size: bool = False
    depth_at_asset_size: bool = False
    micro_batch: int | None = None
    threads: int | None = 1

    @property
    def layout(self) -> Generation:
        """Keys of the generation."""
        return Generation(self.generation)

    def store(self) -> Store:
        """The job's store, one per process."""
        return cached_store(self.job_url, self.job_storage)


@functools.lru_cache(maxsize=8)
def cached_store(url: str, options: StorageOptions) -> Store:
    """A store kept for the life of the process, so that its connections are."""
    return open_store(url, options)


class DecodeShard:
    """One planned shard in, one decoded shard out."""

    def __init__(self, context: StageContext) -> None:
        self.context = context

    def __call__(self, table: pa.Table) -> pa.Table:
        """A row of ``PLAN_SCHEMA`` to a ``DecodedShard`` row, or no row if there is no need."""
        (spec,) = shards_from_table(table)
        store = self.context.store()
        if is_draining(self.context):
            return _nothing("pixels")
        if store.head(self.context.layout.commit_key(spec.shard_id)) is not None:
            return _nothing("pixels")
        started = time.perf_counter()
        tally = DecodeTally(
            store=store,
            generation=self.context.layout,
            lease=self.context.lease,
            shard_id=spec.shard_id,
        )
        decoded = decode_shard(spec, self.context.archive_storage, self.context.limits, tally)
        return replace(decoded, decode_s=time.perf_counter() - started).to_table()


class AnnotateShard:
    """One decoded shard in, one annotated shard out; holds the model.

    Args:
        context: The run.
        weights: Bytes of a safetensors file of this project.
        journal: Where to note what is being done, for whoever comes after this process's death.
    """

    def __init__(
        self, context: StageContext, weights: bytes, journal: Journal | None = None
    ) -> None:
        # Imported here: decode and publish workers share this module and must not import torch.
        from segformer3d.predictor import Predictor
        from segformer3d.weights import model_from_bytes

        self.context, self.journal = context, journal
        model, info = model_from_bytes(weights)
        self.config, self.codec = info.config, info.depth_codec
        self.predictor: Predictor = Predictor(
            model, info, micro_batch=context.micro_batch, threads=context.threads
        )
        self._clock = _ModelClock()

    def __call__(self, table: pa.Table) -> pa.Table:
        """A ``DecodedShard`` row to an ``AnnotatedShard`` row."""
        return self.begin(table)()

    def begin(self, table: pa.Table) -> Callable[[], pa.Table]:
        """Begin what a call does, and return while a GPU is still at work: the next may begin.

        Only one thread may begin shards. What is returned ends this one, in any thread, and has to
        be called once.

        Raises:
            torch.AcceleratorError: As of ``annotate``.
        """
        if table.num_rows == 0 or is_draining(self.context):
            return lambda: _nothing("class_ids", "depth")
        return self._begin(DecodedShard.from_table(table), AnnotatedShard.to_table)

    def annotate(self, shard: DecodedShard) -> AnnotatedShard:
        """Run the model over a shard's good frames.

        A frame whose output is not finite becomes an error of kind ``non_finite``, one that the
        model has no memory for, even alone, of kind ``out_of_memory``, one at which processes keep
        dying, of kind ``crash``.

        Raises:
            torch.AcceleratorError: If the device is lost to this process, which has to end then:
                what was noted stays, so the shard counts as having killed it.
        """
        return self._begin(shard, lambda annotated: annotated)()

    def _begin(
        self, shard: DecodedShard, make: Callable[[AnnotatedShard], _Made]
    ) -> Callable[[], _Made]:
        """Begin a shard, and return what ends it and makes something of the result."""
        deaths = self.journal.deaths(shard.shard_id) if self.journal else Deaths()
        if not deaths:
            return self._begun(shard, "shard", make)
        if self.journal is not None:
            # What kills this process now must be this shard's.
            self.journal.wait_until_alone()
        made = self._begun(spare(shard, deaths), "between", make)()
        return lambda: made

    def _begun(
        self, shard: DecodedShard, place: DeathPlace, make: Callable[[AnnotatedShard], _Made]
    ) -> Callable[[], _Made]:
        """Frames go one by one if what is noted of the shard is ``between``."""
        with self._resting_after_errors(shard.shard_id):
            self._note(shard.shard_id, place)
            begun_s = time.perf_counter()
            waits = list(self._started(shard, one_by_one=place == "between"))
            self._note(shard.shard_id, place)

        def end() -> _Made:
            with self._resting_after_errors(shard.shard_id):
                said = [(rows, wait()) for rows, wait in waits]
                made = make(self._annotated(shard, said, self._clock.seconds_since(begun_s)))
            self._rest(shard.shard_id)
            return made

        return end

    @contextmanager
    def _resting_after_errors(self, shard_id: int) -> Iterator[None]:
        """An error ends the shard, but for one that ends this process."""
        try:
            yield
        except Exception as error:
            if not is_device_lost(error):
                self._rest(shard_id)
            raise

    def _note(self, shard_id: int, place: DeathPlace) -> None:
        if self.journal is not None:
            self.journal.note(shard_id, place)

    def _rest(self, shard_id: int) -> None:
        if self.journal is not None:
            self.journal.rest(shard_id)

    def _annotated(
        self,
        shard: DecodedShard,
        predictions: Sequence[tuple[range, "Predictions | None"]],
        annotate_s: float,
    ) -> AnnotatedShard:
        frames, good = list(shard.frames), shard.good_places
        class_ids: list[UInt8Array] = []
        depth: list[UInt16Array] = []
        certainty: list[Certainty] = []
        for rows, said in predictions:
            for place, row in enumerate(rows):
                if said is None or not said.finite[place]:
                    kind, message = _NO_MEMORY if said is None else _NON_FINITE
                    frames[good[row]] = replace(frames[good[row]], error_kind=kind, error=message)
                    continue
                certainty.append(certainty_of(said, place))
                if said.class_ids is not None:
                    class_ids.append(said.class_ids[place])
                if said.depth is not None:
                    depth.append(said.depth[place])
        return AnnotatedShard(
            shard_id=shard.shard_id,
            frames=tuple(frames),
            class_ids=tuple(class_ids) if self.config.num_classes else None,
            depth=tuple(depth) if self.config.has_depth else None,
            certainty=tuple(certainty),
            depth_codec=self.codec.to_dict() if self.codec is not None else None,
            decode_s=shard.decode_s,
            annotate_s=annotate_s,
        )

    def _started(self, shard: DecodedShard, *, one_by_one: bool) -> Iterator[tuple[range, "_Wait"]]:
        """Runs of rows that share an output size, with what waits for their predictions, in order.

        Frames that go one by one are noted before.
        """
        good = shard.good_places
        sizes = [self._class_ids_size(shard.frames[place]) for place in good]
        start = 0
        while start < len(good):
            stop = start + 1
            if one_by_one:
                self._note(shard.shard_id, good[start])
            else:
                while stop < len(good) and sizes[stop] == sizes[start]:
                    stop += 1
            for rows, wait in self._rows_started(shard.pixels, range(start, stop), sizes[start]):
                yield rows, _done(wait()) if one_by_one else wait
            start = stop

    def _rows_started(
        self, pixels: UInt8Array, rows: range, size: tuple[int, int] | None
    ) -> Iterator[tuple[range, "_Wait"]]:
        """As above; None is predicted of a row that does not fit into memory even alone."""
        from torch import OutOfMemoryError

        try:
            wait = self.predictor.start(pixels[rows.start : rows.stop], class_ids_size=size)
        except (OutOfMemoryError, MemoryError):
            if len(rows) == 1:
                yield rows, _done(None)
                return
            for row in rows:
                yield from self._rows_started(pixels, range(row, row + 1), size)
            return
        yield rows, wait

    def _class_ids_size(self, frame: FrameRecord) -> tuple[int, int] | None:
        if not self.context.class_ids_at_asset_size:
            return None
        return frame.height, frame.width


class _ModelClock:
    """Shares the model's time out among shards that overlap in it, so that it adds up."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._until_s = float("-inf")

    def seconds_since(self, begun_s: float) -> float:
        """The model's seconds from when a shard began, or the one before it ended, to now."""
        with self._lock:
            now_s = time.perf_counter()
            seconds = now_s - max(begun_s, self._until_s)
            self._until_s = now_s
        return seconds


def _done(said: "Predictions | None") -> "_Wait":
    return lambda: said


def is_device_lost(error: BaseException) -> bool:
    """Whether a GPU has failed so that this process can never use it again."""
    from torch import AcceleratorError

    from segformer3d.predictor import is_out_of_memory

    if is_out_of_memory(error):
        return False
    is_fault = isinstance(error, RuntimeError) and str(error).startswith(_DEVICE_FAULTS)
    return is_fault or isinstance(error, AcceleratorError)


class PublishShard:
    """One annotated shard in, one receipt out; the shard is decided when this returns."""

    def __init__(self, context: StageContext) -> None:
        self.context = context

    def __call__(self, table: pa.Table) -> pa.Table:
        """An ``AnnotatedShard`` row to a row of ``RECEIPT_SCHEMA``."""
        if table.num_rows == 0:
            return RECEIPT_SCHEMA.empty_table()
        return self.publish(AnnotatedShard.from_table(table)).to_table()

    def publish(self, shard: AnnotatedShard) -> ShardReceipt:
        """Encode, write, commit, and make the PNGs if this attempt won."""
        started = time.perf_counter()
        context, store = self.context, self.context.store()
        data = encode_shard(
            shard, context.metadata, depth_at_asset_size=context.depth_at_asset_size
        )
        record, won = commit_attempt(
            store, context.layout, context.plan_id, shard.shard_id, shard.frames, data
        )
        if won and context.write_png:
            make_pngs(store, context.layout, shard.shard_id, data)
        return ShardReceipt(
            shard_id=shard.shard_id,
            won=won,
            num_rows=record.num_rows,
            num_ok=record.num_ok,
            size_bytes=sum(file.size_bytes for file in record.files),
            decode_s=shard.decode_s,
            annotate_s=shard.annotate_s,
            publish_s=time.perf_counter() - started,
        )


def make_pngs(store: Store, layout: Generation, shard_id: int, data: bytes) -> None:
    """Make a shard's PNGs of its winning data, and note that; repeating it is harmless."""
    write_png_tree(store, data, anew=layout.number > 0, newer=Generation(layout.number + 1))
    store.put(layout.png_done_key(shard_id), b"")


_drain_seen: dict[tuple[str, int], tuple[float, bool]] = {}


def is_draining(context: StageContext) -> bool:
    """Whether the driver of this run was asked to stop; looks at storage once a second at most."""
    name = (context.job_url, context.lease)
    checked_at, draining = _drain_seen.get(name, (float("-inf"), False))
    now = time.monotonic()
    if draining or now - checked_at < _DRAIN_CHECK_S:
        return draining
    draining = context.store().head(cancel_key(context.lease)) is not None
    _drain_seen[name] = (now, draining)
    return draining


def _nothing(*binaries: str) -> pa.Table:
    columns = {name: pa.array([], pa.large_binary()) for name in binaries}
    return pa.table({"head": pa.array([], pa.string()), **columns})
