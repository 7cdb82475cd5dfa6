"""The command ``evaluate``."""

import json

import click

from jobs.progress import tell


@click.command()
@click.argument("weights", metavar="WEIGHTS")
@click.argument("dataset", metavar="DATASET")
@click.option("--output", metavar="FOLDER", help="For confusion.png and evaluation.json.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Measure N frames, spread evenly; default all.",
)
@click.option(
    "--short-side",
    "short_side_px",
    type=click.IntRange(32, 4096),
    metavar="PIXELS",
    help="Of the model's input; default that of the weights' training, or 512.",
)
@click.option(
    "--depth-cap-m",
    type=click.FloatRange(min=0.1, max=1e4),
    default=80.0,
    show_default=True,
    metavar="METRES",
    help="Pixels farther than that are not measured.",
)
@click.option("--device", metavar="NAME", help="As torch says it; default the GPU, if any.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(
    weights: str,
    dataset: str,
    output: str | None,
    limit: int | None,
    short_side_px: int | None,
    depth_cap_m: float,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure WEIGHTS on a labelled DATASET: IoU per class, and errors of metric depth.

    WEIGHTS is a safetensors file of this project, or `default`. DATASET is KIND:FOLDER with
    options: camvid:FOLDER?split=val, cityscapes:FOLDER?split=val, folder:FOLDER?labels=label_ids,
    origin:FOLDER?split=val, scenes:?count=100, or job:URL?min_confidence=0.8.
    """
    from jobs.evaluate import evaluate_weights, report_fields

    measured = evaluate_weights(
        weights,
        dataset,
        output=output,
        limit=limit,
        short_side_px=short_side_px,
        depth_cap_m=depth_cap_m,
        device=device,
    )
    fields = report_fields(measured, weights, dataset)
    tell(json.dumps(fields, indent=2) if as_json else measured.text())
