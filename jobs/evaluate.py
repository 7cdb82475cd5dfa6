"""The verb ``evaluate``: measure weights on a labelled data set, with frames sized as in jobs."""

import importlib.util
import json
from typing import TYPE_CHECKING, Any

from jobs.datasets import open_any_dataset
from jobs.picture_files import local_path
from jobs.picturing import is_out_of_memory, open_model
from jobs.progress import Progress
from jobs.spec import check_spec
from pipeline.errors import UserError
from pipeline.urls import without_query
from segformer3d.datasets import DatasetError
from segformer3d.evaluation import Evaluation, evaluate, save_confusion_picture
from segformer3d.metrics import DEPTH_MAX_M, DEPTH_MIN_M

if TYPE_CHECKING:
    from pathlib import Path

    from jobs.picturing import Model
    from segformer3d.datasets import SampleSource

# What a job takes when no weights are named.
DEFAULT_WEIGHTS = ("bundled", "default")

PICTURE_NAME = "confusion.png"
FIELDS_NAME = "evaluation.json"


def evaluate_weights(
    weights: str,
    dataset: str,
    *,
    output: str | None = None,
    limit: int | None = None,
    short_side_px: int | None = None,
    depth_cap_m: float = DEPTH_MAX_M,
    device: str | None = None,
) -> Evaluation:
    """Measure weights on a data set.

    Args:
        weights: URL of a weights file, or one of ``DEFAULT_WEIGHTS``.
        dataset: Address of the data set, as ``open_any_dataset`` takes it.
        output: Local folder for the confusion matrix's picture and the numbers; none by default.
        limit: Measure so many frames, spread evenly; by default all.
        short_side_px: Frames' short side; by default that of the weights' training, or 512.
        depth_cap_m: Pixels farther than that are not measured.
        device: Where to run, as torch names it; by default the GPU if there is one.

    Raises:
        UserError: Weights, data set, device or output cannot be used as they stand.
        StorageError: A job as data set cannot be read.
    """
    if not depth_cap_m > DEPTH_MIN_M:
        raise UserError(f"--depth-cap-m {depth_cap_m:g}: more than {DEPTH_MIN_M:g} is needed")
    folder = None if output is None else _made_folder(output)
    try:
        source = open_any_dataset(dataset)
        model = _open_model(weights, device)
        measured = _measured(model, source, limit, short_side_px, depth_cap_m)
    except DatasetError as error:
        raise UserError(f"data set {error}") from None
    except OSError as error:
        where = error.filename or dataset
        raise UserError(f"data set {where}: {error.strerror or error}") from None
    if folder is not None:
        _write(measured, folder, weights, dataset)
    return measured


def report_fields(measured: Evaluation, weights: str, dataset: str) -> dict[str, Any]:
    """The results as plain JSON types, with what was measured on what."""
    return {"weights": without_query(weights), "dataset": dataset, **measured.to_dict()}


def _measured(
    model: "Model",
    source: "SampleSource",
    limit: int | None,
    short_side_px: int | None,
    depth_cap_m: float,
) -> Evaluation:
    total = min(limit or len(source), len(source))
    try:
        with Progress("evaluating", total) as progress:
            return evaluate(
                model.predictor,
                source,
                info=model.info,
                short_side_px=short_side_px,
                depth_cap_m=depth_cap_m,
                limit=limit,
                progress=lambda done: progress.advance(done - progress.done),
            )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError("one frame does not fit into memory; use a smaller --short-side") from None


def _open_model(weights: str, device: str | None) -> "Model":
    url = None if weights in DEFAULT_WEIGHTS else weights
    fields = {"input": {"url": "."}, "output": {"url": "."}, "model": {"weights": url}}
    return open_model(check_spec(fields, "the options"), device)


def _made_folder(output: str) -> "Path":
    """Make the folder before the work, so that nothing is measured in vain."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--output draws with matplotlib: pip install 'segformer3d[train]'")
    folder = local_path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}") from None
    return folder


def _write(measured: Evaluation, folder: "Path", weights: str, dataset: str) -> None:
    text = json.dumps(report_fields(measured, weights, dataset), indent=2)
    try:
        (folder / FIELDS_NAME).write_text(f"{text}\n", encoding="utf-8")
        if measured.classes is not None:
            save_confusion_picture(measured.classes, folder / PICTURE_NAME)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror or error}") from None
