"""The model's own verbs: ``predict`` and ``attention``. They work here, without a job or Ray."""

import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from jobs.progress import tell

if TYPE_CHECKING:
    from jobs.attend import Mode
    from jobs.picturing import FileReport

_EXIT_DONE, _EXIT_QUARANTINED = 0, 3

Command = Callable[..., Any]


def _picture_options(command: Command) -> Command:
    options = (
        click.argument("url", metavar="FILE|FOLDER|URL"),
        click.option("--output", metavar="FOLDER|FILE", help="Where the pictures go."),
        click.option("--weights", metavar="URL", help="Safetensors file of this project."),
        click.option(
            "--short-side",
            "short_side_px",
            type=int,
            metavar="PIXELS",
            help="Of the model's input, a multiple of 32; default the weights' own, or 512.",
        ),
        click.option("--device", metavar="NAME", help="As torch says it; default the GPU, if any."),
        click.option(
            "--endpoint-url", metavar="URL", help="S3 endpoint; default AWS_ENDPOINT_URL."
        ),
    )
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


@click.command()
@_picture_options
@click.option("--json", "as_json", is_flag=True, help="Print class fractions and depth as JSON.")
def predict(as_json: bool, **given: Any) -> int:
    """Draw frame, segmentation and depth of images and videos.

    An image gives NAME_panels.png, a video NAME_panels.mp4 with every frame, a folder both for
    each file. Depth is in metres, where the weights know them.
    """
    from jobs.picturing import PictureRequest
    from jobs.predict import predict as run
    from jobs.predict import report_fields

    reports = run(PictureRequest(**given))
    if as_json:
        tell(json.dumps([report_fields(report) for report in reports], indent=2))
    else:
        _print_outputs(reports)
    return _exit_code(reports)


@click.command()
@_picture_options
@click.option(
    "--at",
    "at_px",
    metavar="X,Y",
    callback=lambda _context, _option, value: _point(value),
    help="The query's column and row in the upright frame; default its centre.",
)
@click.option(
    "--mode",
    type=click.Choice(["query", "mean"]),
    default="query",
    show_default=True,
    help="Where the query looks, or all tokens on average.",
)
@click.option(
    "--block",
    type=int,
    default=-1,
    show_default=True,
    help="Block of each stage, from 1, or from the end.",
)
def attention(at_px: tuple[float, float] | None, mode: "Mode", block: int, **given: Any) -> int:
    """Draw where each stage and head of the model looks.

    A grid over the frame, one tile per head: NAME_attention.png (or _attention_mean.png), and a
    video of it for a video.
    """
    from jobs.attend import attend
    from jobs.picturing import PictureRequest

    reports = attend(PictureRequest(**given), at_px=at_px, mode=mode, block=block)
    _print_outputs(reports)
    return _exit_code(reports)


def _point(value: str | None) -> tuple[float, float] | None:
    if value is None:
        return None
    try:
        x, y = (float(part) for part in value.split(","))
    except ValueError:
        message = f"{value!r} is no point: write --at X,Y"
        raise click.BadParameter(message) from None
    return x, y


def _print_outputs(reports: "Sequence[FileReport]") -> None:
    for report in reports:
        if report.output is not None:
            tell(os.fsencode(report.output))  # whatever bytes the path has


def _exit_code(reports: "Sequence[FileReport]") -> int:
    return _EXIT_QUARANTINED if any(report.error for report in reports) else _EXIT_DONE
