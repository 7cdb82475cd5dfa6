"""Do anew what `verify` found broken, in a generation of its own.

Nothing is deleted but damaged snapshots, which only save time.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from jobs.claim import OpenJob, reopen_job
from jobs.cluster import check_cluster
from jobs.findings import Findings
from jobs.generations import (
    Frames,
    GenerationView,
    History,
    by_asset,
    frames_of,
    read_part,
    read_plans,
)
from jobs.lease import heartbeats
from jobs.manifest import drop_damaged_snapshots
from jobs.progress import Progress, say
from jobs.replan import Replanner
from jobs.runner import drive
from jobs.spec import RaySection
from jobs.verify import verify_job
from pipeline.commit import parse_commit
from pipeline.errors import JobError, UserError
from pipeline.layout import Generation
from pipeline.records import ShardSpec
from pipeline.sinks.png import write_png_tree
from pipeline.storage import StorageOptions, Store, open_store


def repair_job(url: str, storage: StorageOptions, *, ray: RaySection | None = None) -> Findings:
    """Verify a job, add a generation for the shards that are broken, and verify again.

    PNGs that are missing or show other things are made anew from the data, which stays as it is.
    The broken shards are not read any more, by anybody; what is of another making (a foreign
    object, a plan that was changed) stays a fault, for a person to decide.

    Args:
        url: The job's URI.
        storage: How to reach it.
        ray: What to take of this machine or cluster instead of what the job says.

    Returns:
        What is found at the end.

    Raises:
        UserError: If there is no job, no plan yet, or a driver that is still at work.
        JobError: If an object of the job cannot be read, or the run had to stop.
    """
    store = open_store(url, storage)
    plans = read_plans(store)
    for generation, plan in plans:
        for key in drop_damaged_snapshots(store, generation, plan.plan_id, plan.num_shards):
            say(f"Deleted {key}, which was damaged; the records say the same.")
    findings = verify_job(url, storage)
    if findings.unread:
        message = (
            f"{store.url}: nothing was done: what cannot be read may be sound, so repair again"
            f" once it can be ({findings.unread[0]})"
        )
        raise JobError(message)
    if not findings.broken and not findings.bad_pngs:
        is_left = findings.undecided or findings.num_without_pngs or not findings.is_finished
        hint = "; go on with `segformer3d resume`" if is_left else ""
        say(f"No shard is broken{hint}.")
        return findings
    _refuse_company(store)
    if len(read_plans(store)) != len(plans):
        say("Somebody else has added a generation meanwhile: verifying again.")
        return repair_job(url, storage, ray=ray)
    next_one = Generation(len(plans))
    if findings.broken:
        check_cluster()
        _do_anew(replace(reopen_job(url, storage, ray), generation=next_one), findings)
        next_one = Generation(len(plans) + 1)
        findings = verify_job(url, storage)
    if findings.unread or not findings.bad_pngs:
        return findings
    _make_pngs(store, findings.bad_pngs, newer=next_one)
    return verify_job(url, storage)


def _do_anew(job: OpenJob, findings: Findings) -> None:
    """Replace what is broken, in the job's generation."""
    history = History.load(job.store)
    # An unfinished job goes on in the new generation: its drivers would stop at what is broken.
    left = set(_still_undecided(history, findings.undecided))
    replaced = findings.broken | left
    wanted = _frames_of(history, replaced)
    say(f"Doing {len(replaced)} shards anew.")
    drive(
        replace(
            job,
            planner=lambda: Replanner(
                job.spec,
                wanted,
                reason="repair",
                replaced=sorted(replaced),
                held=history.assets,
            ),
        )
    )


def _still_undecided(
    history: History, undecided: Mapping[int, Sequence[int]]
) -> Iterator[tuple[int, int]]:
    """``(generation, shard_id)`` of what nobody has decided since it was looked at."""
    for view in history.views:
        number, done = view.generation.number, view.manifest.done()
        yield from ((number, item) for item in undecided.get(number, ()) if not done[item])


def _make_pngs(store: Store, bad: Mapping[str, tuple[int, int]], newer: Generation) -> None:
    """Write these PNGs anew, each from the shard of the generation that decides it.

    Once ``newer`` is planned none is deleted: it may be of that one.
    """
    by_shard: dict[tuple[int, int], set[str]] = defaultdict(set)
    for key, shard in bad.items():
        by_shard[shard].add(key)
    plans = {generation.number: (generation, plan) for generation, plan in read_plans(store)}
    with Progress("making PNGs", len(bad)) as progress:
        for (number, shard_id), keys in sorted(by_shard.items()):
            generation, plan = plans[number]
            record = store.read(generation.commit_key(shard_id))
            for file in parse_commit(record, plan.plan_id, shard_id).files:
                rows = store.read(f"{generation.prefix}{file.path}")
                done = write_png_tree(store, rows, anew=number > 0, newer=newer, only=keys)
                progress.advance(done)


def _refuse_company(store: Store) -> None:
    """A driver at work would go on with shards that nobody reads any more."""
    for driver in heartbeats(store):
        if driver.is_alive:
            message = (
                f"{store.url}: process {driver.pid} on {driver.host} works on this job; "
                "let it end, or stop it with `segformer3d cancel`, then repair"
            )
            raise UserError(message)


def _frames_of(history: History, replaced: Collection[tuple[int, int]]) -> Frames:
    """The frames of those shards, by asset; what a newer generation decided is that one's."""

    def frames() -> Iterator[tuple[str, int]]:
        for view in history.views:
            ids = {shard_id for number, shard_id in replaced if number == view.generation.number}
            for asset, index in frames_of(_shards_in(view, ids)):
                if view.counts(asset, index):
                    yield asset, index

    return by_asset(frames())


def _shards_in(view: GenerationView, shard_ids: Collection[int]) -> Iterator[ShardSpec]:
    for part in view.plan.parts:
        if any(part.first_shard <= item < part.first_shard + part.num_shards for item in shard_ids):
            yield from (item for item in read_part(view.store, part) if item.shard_id in shard_ids)
