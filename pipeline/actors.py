"""The processes that hold a model, as Ray starts them: one shard at a time, or some."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import ray

from pipeline.deaths import Journal
from pipeline.decode import DecodeLimits, start_child
from pipeline.pinned import read_pinned
from pipeline.stages import (
    AnnotateShard,
    DecodeShard,
    PublishShard,
    StageContext,
    is_device_lost,
    is_draining,
)

# Decode and publish are short beside the model, and all of them must fit beside the actors: if
# decode could take everything that these leave, nothing would be published, so nothing committed,
# before the object store is full.
IO_TASK_CPUS = 1 / 32
# So long workers started together are kept, for that many others to start beside them; loading
# what they need takes as long.
_TOGETHER_S = 3.0
_EXIT_DEVICE_LOST = 70


@dataclass(frozen=True, kw_only=True)
class WeightsFile:
    """The weights that a job keeps beside its data.

    Attributes:
        key: Key within the job.
        sha256: What the job's record pins.
    """

    key: str
    sha256: str


class AnnotateActor(AnnotateShard):
    """``AnnotateShard`` that fetches its weights from the job's folder.

    So a restarted actor finds them whatever became of the driver's memory.
    """

    SHARDS_AT_A_TIME = 1
    # The next one is there when one is done.
    SHARDS_IN_FLIGHT = 2

    def __init__(self, context: StageContext, weights: WeightsFile, at_a_time: int = 1) -> None:
        store = context.store()
        data = read_pinned(store, weights.key, weights.sha256)
        journal = Journal(store, context.layout, context.lease, at_a_time=at_a_time)
        super().__init__(context, data, journal)

    def begin(self, table: pa.Table) -> Callable[[], pa.Table]:
        """As ``AnnotateShard`` does, but a lost device ends the process."""
        with _ending_with_the_device():
            end = super().begin(table)

        def end_or_exit() -> pa.Table:
            with _ending_with_the_device():
                return end()

        return end_or_exit


@contextmanager
def _ending_with_the_device() -> Iterator[None]:
    """End this process with its device.

    Ray puts another one in its place, and what was under way is tried again there.
    """
    try:
        yield
    except Exception as error:
        if is_device_lost(error):
            sys.stderr.write(f"the device is lost: {error}\n")
            os._exit(_EXIT_DEVICE_LOST)
        raise


class ThreadedActor:
    """``AnnotateActor`` with a thread for the model: Ray fetches and stores shards meanwhile."""

    def __init__(self, context: StageContext, weights: WeightsFile, at_a_time: int) -> None:
        # The model keeps to one thread: how many more torch starts is each thread's own setting,
        # and shards begin one after the other.
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")
        started = self._model.submit(AnnotateActor, context, weights, at_a_time)
        self._annotate = started.result()

    def __call__(self, table: pa.Table) -> pa.Table:
        """As ``AnnotateShard`` does, from several threads."""
        # Looks at storage now and then, which the model need not wait for.
        is_draining(self._annotate.context)
        end = self._model.submit(self._annotate.begin, table).result()
        return end()


class GpuActor(ThreadedActor):
    """``ThreadedActor`` beside a GPU, which has the next shard's frames before the last are done.

    torch's threads only copy frames here, now and then, and let go of their cores in between: by
    default each keeps one busy, waiting, which decoding wants. What the environment says goes
    first.

    Args:
        context: The run.
        weights: The model.
        num_workers: What ``start_workers`` is to start before the model is loaded.
    """

    # One that ends, one in the model, and one that waits for it.
    SHARDS_AT_A_TIME = 3
    # Until Ray Data looks again for what is done, and sends more, a GPU must have enough.
    SHARDS_IN_FLIGHT = 8

    def __init__(self, context: StageContext, weights: WeightsFile, num_workers: int = 0) -> None:
        # Read when torch is loaded, which is in a moment.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        # This process has its place; those that follow cannot make it wait for one.
        if num_workers and not ray.get_runtime_context().was_current_actor_reconstructed:
            start_workers(context.limits, num_workers)
        super().__init__(context, weights, self.SHARDS_AT_A_TIME)


def start_workers(limits: DecodeLimits, count: int) -> None:
    """Have Ray start workers for decode and publish tasks, as many as will be wanted at a time.

    It would start one per CPU, and others when both stages want some: just when the first shards
    are through the model, and each takes three seconds of a core until it and its decoding child
    are there. Returns at once; what cannot be started fails where it is wanted.

    Args:
        limits: Of the decoder.
        count: Workers.
    """
    start = ray.remote(num_cpus=IO_TASK_CPUS, max_retries=0)(_start_worker)
    until_s = time.time() + _TOGETHER_S
    for _ in range(count):
        start.remote(limits, until_s)


def _start_worker(limits: DecodeLimits, until_s: float) -> None:
    import ray.data  # noqa: F401 - what its tasks will want, as is this module

    start_child(limits)
    time.sleep(max(0.0, until_s - time.time()))


class WholeActor:
    """All three stages in the process that holds the model."""

    # While one is in the model, the next is decoded, and the one before it is published.
    SHARDS_AT_A_TIME = 2
    # No more than are at work, or at the end one actor would hold what others could do.
    SHARDS_IN_FLIGHT = SHARDS_AT_A_TIME

    def __init__(self, context: StageContext, weights: WeightsFile) -> None:
        self._decode, self._publish = DecodeShard(context), PublishShard(context)
        self._annotate = ThreadedActor(context, weights, self.SHARDS_AT_A_TIME)

    def __call__(self, table: pa.Table) -> pa.Table:
        """A row of ``PLAN_SCHEMA`` to its receipt."""
        return self._publish(self._annotate(self._decode(table)))
