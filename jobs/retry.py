"""Try the quarantined frames of a finished job again, in a generation of their own."""

from collections.abc import Sequence
from dataclasses import replace

from jobs.claim import reopen_job
from jobs.cluster import check_cluster
from jobs.generations import History, by_asset
from jobs.plan import read_plan
from jobs.progress import say
from jobs.replan import Replanner
from jobs.runner import RunResult, drive
from jobs.spec import RaySection
from pipeline.errors import ERROR_KINDS, UserError
from pipeline.storage import StorageOptions


def retry_job(
    url: str,
    storage: StorageOptions,
    *,
    only: Sequence[str] = (),
    ray: RaySection | None = None,
) -> RunResult:
    """Add a generation with exactly the frames that are quarantined; the rest is untouched.

    The files are looked at anew, so one that was replaced since, or may be read now, comes out.

    Args:
        url: The job's URI.
        storage: How to reach it.
        only: Kinds of error to try again; empty for all.
        ray: What to take of this machine or cluster instead of what the job says.

    Raises:
        UserError: If there is no job, it is unfinished, or a kind is none.
        JobError: If the run had to stop; `resume` goes on with it.
    """
    unknown = sorted(set(only) - set(ERROR_KINDS))
    if unknown:
        message = f"--only {unknown[0]}: no such kind; there are {', '.join(ERROR_KINDS)}"
        raise UserError(message)
    check_cluster()
    job = reopen_job(url, storage, ray)
    history = History.load(job.store)
    # Whoever plans a newer generation leaves this one as it is: its PNGs must all be there.
    is_finished = history.is_complete and job.store.exists(history.views[-1].generation.success_key)
    if not is_finished:
        message = f"{job.store.url}: unfinished; finish it first with `segformer3d resume`"
        raise UserError(message)
    chosen = [item for item in history.quarantined() if not only or item[2] in only]
    if not chosen:
        say(f"Nothing to try again: no frame is quarantined{_with(only)}.")
        return drive(job)
    frames = "1 frame" if len(chosen) == 1 else f"{len(chosen)} frames"
    say(f"Trying {frames} again that are quarantined{_with(only)}.")
    wanted, generation = (
        by_asset((asset, index) for asset, index, _, _ in chosen),
        history.next_generation,
    )
    result = drive(
        replace(
            job,
            generation=generation,
            planner=lambda: Replanner(
                job.spec, wanted, reason="retry", only=only, held=history.assets
            ),
        )
    )
    plan = read_plan(job.store, generation)
    if plan is not None and (plan.reason, plan.only) != ("retry", tuple(only)):
        asked = f"a {plan.reason}{_with(plan.only)}"
        say(f"Somebody else was faster with {asked}, which was done instead; retry again.")
    return result


def _with(only: Sequence[str]) -> str:
    return f" with {' or '.join(only)}" if only else ""
