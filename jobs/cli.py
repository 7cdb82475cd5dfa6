"""The one command line.

Exit codes: 0 done, 1 failed, 2 the user's mistake, 3 done with quarantined inputs, 130 interrupted
(resumable). Results go to standard output, news to standard error.
"""

import contextlib
import functools
import json
import shlex
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, NoReturn

import click

from jobs.cli_evaluate import evaluate
from jobs.cli_model import attention, predict
from jobs.cli_train import fetch, train
from jobs.progress import hush, say, tell
from pipeline.errors import (
    ObjectForbiddenError,
    Segformer3dError,
    UserError,
    one_line,
    without_controls,
)
from pipeline.storage import StorageOptions
from pipeline.urls import redact

EXIT_DONE, EXIT_FAILED, EXIT_USER, EXIT_QUARANTINED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

Command = Callable[..., Any]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script."""
    if sys.stderr is None:
        hush()
    sys.excepthook = _print_traceback
    threading.excepthook = _print_thread_s_traceback
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: As on the command line; None takes them from there.

    Returns:
        The exit code.
    """
    try:
        code = cli.main(
            list(arguments) if arguments is not None else None,
            prog_name="segformer3d",
            standalone_mode=False,
        )
    except (click.ClickException, Segformer3dError) as error:
        return _failed(error)
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _complain("interrupted; a job goes on with `segformer3d resume`", EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_FAILED
    return code if isinstance(code, int) else EXIT_DONE


def _failed(error: click.ClickException | Segformer3dError) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return EXIT_USER
    if isinstance(error, click.ClickException):
        return _complain(error.format_message(), EXIT_USER)
    users = isinstance(error, UserError | ObjectForbiddenError)
    return _complain(str(error), EXIT_USER if users else EXIT_FAILED)


def _complain(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # who cannot be told has the code
        click.echo(f"segformer3d: {redact(one_line(message))}", err=True)
    return code


def _print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What nobody foresaw is told in full, but for credentials."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _print_thread_s_traceback(arguments: threading.ExceptHookArgs) -> None:
    """As of the main thread."""
    if arguments.exc_value is not None:
        _print_traceback(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)


def _spec_options(command: Command) -> Command:
    options = (
        click.argument("job", required=False, type=click.Path(), metavar="[JOB.yaml]"),
        click.option("--input", "input_url", metavar="URL", help="Folder, file or glob."),
        click.option("--output", "output_url", metavar="URL", help="The job's folder."),
        click.option("--weights", metavar="URL", help="Safetensors file of this project."),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As in the YAML."
        ),
        _json_option,
    )
    return functools.reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_endpoint_option = click.option(
    "--endpoint-url", metavar="URL", help="S3 endpoint; default AWS_ENDPOINT_URL."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="segformer3d")
def cli() -> None:
    """Annotate archives of images and videos with segmentation and depth."""


@cli.command()
@_spec_options
def plan(as_json: bool, **given: Any) -> None:
    """Say what a job would do, without doing it."""
    from jobs.dry_run import dry_run

    report = dry_run(_spec(**given))
    _print(asdict(report), as_json, report.text())


@cli.command("run")
@_spec_options
def run_command(as_json: bool, **given: Any) -> int:
    """Plan and annotate here: embedded Ray, or the cluster that RAY_ADDRESS names.

    Run again on its own unfinished output, it goes on from there.
    """
    from jobs.runner import run_job

    return _report(run_job(_spec(**given)), as_json)


@cli.command()
@click.argument("url", metavar="JOB")
@click.option("--set", "overrides", multiple=True, metavar="ray.KEY=VALUE")
@click.option("--lease", type=int, hidden=True)
@_endpoint_option
@_json_option
def resume(
    url: str, overrides: Sequence[str], lease: int | None, endpoint_url: str | None, as_json: bool
) -> int:
    """Go on with the job at a URI, with the settings it was made with."""
    from jobs.runner import resume_job
    from jobs.spec import load_ray_section

    ray = load_ray_section(overrides) if overrides else None
    return _report(resume_job(url, _storage(endpoint_url), ray=ray, lease=lease), as_json)


@cli.command()
@_spec_options
@click.option("--address", required=True, metavar="URL", help="http://HOST:8265 of the cluster.")
def submit(address: str, as_json: bool, **given: Any) -> None:
    """Hand a job to a cluster's Ray Jobs server and print the job's URI."""
    from jobs.submit import submit_job

    submission = submit_job(_spec(**given), address)
    _print(asdict(submission), as_json, submission.url)


@cli.command()
@click.argument("url", metavar="JOB")
@_endpoint_option
@_json_option
def status(url: str, endpoint_url: str | None, as_json: bool) -> None:
    """Say how far a job is; reads its folder only."""
    from jobs.status import job_status

    found = job_status(url, _storage(endpoint_url))
    _print(asdict(found), as_json, found.text())


@cli.command("list")
@click.argument("root", metavar="ROOT")
@_endpoint_option
@_json_option
def list_command(root: str, endpoint_url: str | None, as_json: bool) -> None:
    """Find the jobs below a URL."""
    from jobs.status import find_jobs

    found = find_jobs(root, _storage(endpoint_url))
    _print([asdict(job) for job in found], as_json, "\n".join(job.line() for job in found))


@cli.command()
@click.argument("url", metavar="JOB")
@_endpoint_option
@_json_option
def cancel(url: str, endpoint_url: str | None, as_json: bool) -> None:
    """Ask a job's drivers to finish what is in the model and stop; it can be resumed."""
    from jobs.lease import request_cancel
    from jobs.record import read_job
    from pipeline.storage import open_store

    store = open_store(url, _storage(endpoint_url))
    read_job(store)
    asked = request_cancel(store)
    lines = (one_line(f"asked process {item.pid} on {item.host} to stop") for item in asked)
    text = "\n".join(lines) or "no driver works on this job"
    _print([asdict(item) for item in asked], as_json, text)


@cli.command()
@click.argument("url", metavar="JOB")
@click.option("--only", multiple=True, metavar="KIND", help="Kind of error; default all. Repeat.")
@click.option("--set", "overrides", multiple=True, metavar="ray.KEY=VALUE")
@_endpoint_option
@_json_option
def retry(
    url: str,
    only: Sequence[str],
    overrides: Sequence[str],
    endpoint_url: str | None,
    as_json: bool,
) -> int:
    """Try the quarantined frames of a finished job again, and nothing else.

    The files are looked at anew. The frames form a generation of their own, whose rows count.
    """
    from jobs.retry import retry_job
    from jobs.spec import load_ray_section

    ray = load_ray_section(overrides) if overrides else None
    return _report(retry_job(url, _storage(endpoint_url), only=only, ray=ray), as_json)


@cli.command()
@click.argument("url", metavar="JOB")
@click.option("--repair", is_flag=True, help="Do anew what is broken, in a generation of its own.")
@_endpoint_option
@_json_option
def verify(url: str, repair: bool, endpoint_url: str | None, as_json: bool) -> int:
    """Check every record, object and row of a job against its plan."""
    from jobs.repair import repair_job
    from jobs.verify import verify_job

    storage = _storage(endpoint_url)
    findings = repair_job(url, storage) if repair else verify_job(url, storage)
    fields = {**asdict(findings), "broken": sorted(findings.broken)}
    fields |= {"sound": findings.is_sound, "complete": findings.is_complete}
    _print(fields, as_json, findings.text())
    return EXIT_DONE if findings.is_complete else EXIT_FAILED


@cli.command()
@click.option("--folder", default="demo", show_default=True, help="Where the demo lives.")
def demo(folder: str) -> int:
    """Make a small synthetic dashcam archive, annotate it, and draw one frame of it."""
    from jobs.demo import run_demo

    return _exit_code(run_demo(folder).outcome)


@cli.group()
def weights() -> None:
    """Import and describe weights."""


@weights.command("import")
@click.argument("source", metavar="SOURCE")
@click.argument("target", metavar="TARGET.safetensors")
@click.option("--half", is_flag=True, help="Store them as float16, half the size.")
def weights_import(source: str, target: str, half: bool) -> None:
    """Turn the origin's .pt, an NVlabs .pth or a Hugging Face folder into our format."""
    from jobs.weights import import_to_file

    tell(import_to_file(source, target, half=half))


@weights.command("show")
@click.argument("path", required=False, metavar="[FILE]")
@_json_option
def weights_show(path: str | None, as_json: bool) -> None:
    """Say what a weights file holds; without a name, the one in the box."""
    from jobs.weights import describe

    fields = describe(path)
    # A file may be a stranger's, and holds text.
    lines = (one_line(f"{name}: {value}") for name, value in fields.items())
    _print(fields, as_json, "\n".join(lines))


cli.add_command(predict)
cli.add_command(attention)
cli.add_command(evaluate)
cli.add_command(train)
weights.add_command(fetch)


def _spec(
    job: str | None,
    input_url: str | None,
    output_url: str | None,
    weights: str | None,
    overrides: Sequence[str],
) -> Any:
    from jobs.spec import load_spec

    flags = {"input.url": input_url, "output.url": output_url, "model.weights": weights}
    return load_spec(job, overrides, flags)


def _storage(endpoint_url: str | None) -> StorageOptions:
    return StorageOptions(endpoint_url=endpoint_url)


def _report(result: Any, as_json: bool) -> int:
    text = (
        f"{result.outcome}: {result.num_ok} of {result.num_frames} frames annotated, "
        f"{result.num_quarantined} quarantined, {result.num_done} of {result.num_shards} shards "
        f"({result.num_computed} in this run)\n{result.url}"
    )
    _print(asdict(result), as_json, text)
    if result.outcome == "interrupted":
        say(f"go on with: segformer3d resume {shlex.quote(result.url)}")
    return _exit_code(result.outcome)


def _exit_code(outcome: str) -> int:
    codes = {"done": EXIT_DONE, "quarantined": EXIT_QUARANTINED, "interrupted": EXIT_INTERRUPTED}
    return codes[outcome]


def _print(fields: object, as_json: bool, text: str) -> None:
    # A last look: texts are made of what strangers have stored.
    shown = "\n".join(map(without_controls, text.split("\n")))
    tell(json.dumps(fields, indent=2) if as_json else shown)


if __name__ == "__main__":
    main()
