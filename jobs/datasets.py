"""Every data set that a command can name: those of the model's package, and finished jobs."""

from typing import TYPE_CHECKING

from segformer3d.datasets.registry import Kind, Options, open_dataset
from segformer3d.datasets.sample import DatasetError

if TYPE_CHECKING:
    from segformer3d.datasets import SampleSource


def open_any_dataset(address: str) -> "SampleSource":
    """Open the data set at an address.

    Args:
        address: As `segformer3d.datasets.registry.open_dataset` takes it, or `job:URL` for a
            finished job, with the option `min_confidence`.

    Raises:
        DatasetError: The kind or an option is unknown, or the data are not there.
        UserError: The job is not there or not finished.
        StorageError: The job cannot be read.
    """
    if not address.startswith("job:") and "://" in address:
        raise DatasetError("only a job can be named by a URL, other data sets by a local folder")
    return open_dataset(address, {"job": Kind(_job, ("min_confidence",))})


def _job(url: str, options: Options) -> "SampleSource":
    from jobs.job_dataset import JobDataset

    text = options.get("min_confidence", "0")
    try:
        least = float(text)
    except ValueError:
        least = float("nan")
    if not 0 <= least <= 1:
        raise DatasetError(f"option min_confidence must be 0 to 1, not {text[:40]!r}")
    return JobDataset(url, min_confidence=least)
