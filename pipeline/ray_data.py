"""How Ray Data is set for our graphs, one shard a block."""

import contextlib
import os
from collections.abc import Iterator

import ray.data
from ray.data._internal.execution import streaming_executor_state

from pipeline.replaced import replaced

# A GPU may be through with a shard in a hundredth of a second. Each look costs the driver 3 ms.
_GPU_LOOKS_EVERY_S = 0.02
_WAIT = "WAIT_FOR_TASK_COMPLETION_TIMEOUT_S"


@contextlib.contextmanager
def configured(*, for_gpus: bool) -> Iterator[None]:
    """Set what holds for this process, and what holds while a graph runs.

    Args:
        for_gpus: Whether the model runs on GPUs.
    """
    # The default of Ray 2.60 ("RATE_BASED") allots a run the CPUs of the operators that it finds
    # slow, and of the rest only whole ones: with fractions it left publish none for minutes, and
    # annotated shards piled up uncommitted until the object store was full.
    os.environ.setdefault("RAY_DATA_CLUSTER_AUTOSCALER", "V2")
    settings = ray.data.DataContext.get_current()
    # A block holds at least one row, so a bound that every row exceeds makes each shard a block of
    # its own. (`repartition(target_num_rows_per_block=1)` would do so too, but as an operator of
    # one CPU a task, which waits for ever beside actors that leave it less.)
    settings.target_max_block_size = 1
    settings.enable_progress_bars = False
    # An unexpected exception stops the run: bad inputs never raise, they become rows.
    settings.max_errored_blocks = 0
    # Ray Data waits a tenth of a second for tasks, unless all of them are done, before it sends
    # others. Ray 2.60 has no setting for that.
    with (
        replaced(streaming_executor_state, _WAIT, _GPU_LOOKS_EVERY_S)
        if for_gpus
        else contextlib.nullcontext()
    ):
        yield
