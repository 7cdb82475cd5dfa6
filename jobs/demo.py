"""The demo: a synthetic dashcam archive, annotated by a real job, and one picture of the result."""

from pathlib import Path

import cv2
import numpy as np

from jobs.demo_archive import make_demo_archive
from jobs.progress import say
from jobs.runner import RunResult, run_job
from jobs.spec import check_spec
from pipeline.encode import decode_class_ids, decode_depth, encode_png
from pipeline.errors import UserError
from segformer3d.config import DepthCodec
from segformer3d.draw import three_panels

_STILL = "stills/"


def run_demo(folder: str) -> RunResult:
    """Make the archive if it is not there, run the job or go on with it, and draw one still.

    Args:
        folder: Where archive, job and picture go.

    Raises:
        UserError: If the folder holds something else, or cannot be written.
    """
    root = Path(folder).absolute()
    archive, output = root / "archive", root / "job"
    say(f"Making a small dashcam archive in {archive}")
    try:
        make_demo_archive(archive)
    except OSError as error:
        message = f"--folder {folder}: cannot write there: {error.strerror}"
        raise UserError(message) from error
    spec = check_spec(
        {
            "input": {"url": str(archive)},
            "output": {"url": str(output), "png": True},
            "geometry": {"short_side_px": 256},
            "shard": {"frames": 24},
        },
        "the demo",
    )
    result = run_job(spec)
    if result.outcome == "interrupted":
        say("Interrupted; `segformer3d demo` goes on.")
        return result
    picture = _draw(archive, output, root / "demo.png")
    say("")
    say(f"archive  {archive}")
    say(f"Parquet  {output / 'gen-0000' / 'data'}")
    say(f"PNGs     {output / 'png'}")
    say(f"picture  {picture}")
    return result


def _draw(archive: Path, output: Path, target: Path) -> Path:
    """Frame, segmentation and depth of the archive's first still, side by side."""
    still = min((archive / "stills").glob("*.jpg"))
    frame = cv2.imread(str(still), cv2.IMREAD_COLOR_RGB)
    stem = output / "png" / _STILL / still.name
    class_ids = decode_class_ids(Path(f"{stem}_labelTrainIds.png").read_bytes())
    depth = decode_depth(Path(f"{stem}_depth.png").read_bytes())
    picture = three_panels(np.asarray(frame, np.uint8), class_ids, DepthCodec().decode(depth))
    target.write_bytes(encode_png(picture))
    return target
