"""The verb ``train`` and the fetching of published weights."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from jobs.progress import say, tell

if TYPE_CHECKING:
    from collections.abc import Sequence

_EXIT_DONE, _EXIT_INTERRUPTED = 0, 130


@click.command()
@click.argument("config", metavar="CONFIG.yaml")
@click.option("--output", required=True, metavar="FOLDER", help="Checkpoint, weights and logs.")
@click.option("--max-minutes", type=float, metavar="M", help="Stop after so many minutes.")
@click.option(
    "--num-workers",
    type=click.IntRange(max=10_000),
    default=1,
    show_default=True,
    metavar="N",
    help="Processes that share each batch, through Ray Train; they must all see the output.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As in the YAML.")
@click.option("--device", metavar="NAME", help="As torch says it; default the GPU, if any.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def train(overrides: "Sequence[str]", as_json: bool, **given: Any) -> int:
    """Train the network as a recipe says.

    The same command on the same folder goes on from its checkpoint, bit for bit on a CPU. Under
    torchrun its processes train together.
    """
    from jobs.train import train as run
    from jobs.train_rank import TrainRequest

    report = run(TrainRequest(overrides=tuple(overrides), **given))
    if report.is_first:
        fields = {name: value for name, value in asdict(report).items() if name != "is_first"}
        tell(json.dumps(fields, indent=2) if as_json else report.text())
        if report.go_on is not None:
            say(f"go on with: {report.go_on}")
    return _EXIT_INTERRUPTED if report.outcome == "interrupted" else _EXIT_DONE


@click.command("fetch")
@click.argument("name", metavar="NAME")
@click.argument("target", metavar="TARGET.safetensors")
@click.option("--revision", metavar="R", help="Branch, tag or commit; default the newest.")
@click.option("--sha256", metavar="HEX", help="Refuse other published weights than these.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fetch(name: str, target: str, revision: str | None, sha256: str | None, as_json: bool) -> None:
    """Fetch a published SegFormer by its name on the Hugging Face hub, into our format.

    Such as nvidia/segformer-b0-finetuned-cityscapes-1024-1024 and its kin.
    """
    from jobs.fetch import fetch_weights

    report = fetch_weights(name, target, revision=revision, sha256=sha256)
    tell(json.dumps(asdict(report), indent=2) if as_json else report.text())
