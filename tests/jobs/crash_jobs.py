"""Small jobs whose drivers are killed and started again, and what an undisturbed one makes."""

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jobs.spec import check_spec
from pipeline.storage import open_store
from segformer3d.weights import untrained_weights
from tests.budget import Share
from tests.integration.jobs_under_test import GENERATION, JobUnderTest, Row
from tests.jobs import crash_points
from tests.jobs.crash_points import Orders, Point
from tests.jobs.job_parts import TINY
from tests.jobs.local_graph import Footage
from tests.media import encode_image, picture, write_video

EXIT_FAILED, EXIT_QUARANTINED, KILLED = 1, 3, -9
SETTINGS = ("geometry.short_side_px=64", "shard.frames=2", "output.png=true")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An archive, and what an undisturbed run makes of it.

    Attributes:
        folder: For whatever is to be kept.
        archive: The archive.
        weights: The weights.
        footage: File of what the decoder says of the archive.
        rows: What the job's rows say.
        pngs: Digests of its PNG tree.
        num_shards: Shards of its plan.
    """

    folder: Path
    archive: Path
    weights: Path
    footage: Path
    rows: list[Row]
    pngs: dict[str, str]
    num_shards: int

    def job(self, url: str, environment: dict[str, str] | None = None) -> "KilledJob":
        """A job of this archive that lives at ``url``."""
        under_test = JobUnderTest(
            archive=str(self.archive), url=url, weights=self.weights, folder=self.folder
        )
        return KilledJob(self, under_test, environment or {})


def make_archive(folder: Path, *, num_frames: int = 4, num_stills: int = 2) -> Path:
    """A clip, stills, and a file that is no picture."""
    folder.mkdir(parents=True)
    write_video(folder / "clip.mp4", num_frames=num_frames, gop=2)
    for index in range(num_stills):
        still = encode_image(picture(seed=index), "JPEG")
        (folder / f"still-{index:03}.jpg").write_bytes(still)
    (folder / "bad.jpg").write_bytes(b"no picture at all")
    return folder


def make_reference(folder: Path, *, num_frames: int = 4, num_stills: int = 2) -> Reference:
    """Make an archive and run a job over it that nobody disturbs."""
    archive = make_archive(folder / "archive", num_frames=num_frames, num_stills=num_stills)
    weights = folder / "weights.safetensors"
    weights.write_bytes(untrained_weights(TINY))
    fields = {
        "input": {"url": str(archive)},
        "output": {"url": str(folder / "planned")},
        "geometry": {"short_side_px": 64},
        "shard": {"frames": 2},
    }
    footage = Footage.of(check_spec(fields, "the job")).save(folder / "footage")
    bare = Reference(
        folder=folder,
        archive=archive,
        weights=weights,
        footage=footage,
        rows=[],
        pngs={},
        num_shards=0,
    )
    job = bare.job(str(folder / "undisturbed"))
    job.finish()
    job.look.check_sound()
    rows, pngs, plan = job.look.rows(), job.look.pngs(), job.look.plan()
    assert plan is not None
    assert sum(row[1] == "ok" for row in rows) == num_frames + num_stills == len(rows) - 1
    assert len(pngs) == 3 * (num_frames + num_stills)
    return replace(bare, rows=rows, pngs=pngs, num_shards=plan.num_shards)


@dataclass(frozen=True)
class KilledJob:
    """A job whose drivers are forked, and may be killed.

    Attributes:
        reference: What it shall be in the end.
        look: A look at its folder.
        environment: What its drivers find in theirs.
    """

    reference: Reference
    look: JobUnderTest
    environment: dict[str, str]

    def orders(
        self, verb: Literal["run", "resume"] = "run", die_at: Point | None = None, **more: object
    ) -> Orders:
        """Orders for a driver: ``run`` with all settings, or ``resume`` with the URI alone."""
        arguments = [verb, self.look.url]
        if verb == "run":
            arguments = [verb, "--input", self.look.archive, "--output", self.look.url]
            arguments += ["--weights", str(self.look.weights)]
            for setting in SETTINGS:
                arguments += ["--set", setting]
        plain = Orders(
            arguments=tuple(arguments),
            environment=self.environment,
            footage=self.reference.footage,
            die_at=die_at,
            said=self.reference.folder / f"{uuid.uuid4().hex}.err",
        )
        return replace(plain, **more)  # type: ignore[arg-type]

    def again(self, die_at: Point | None = None, *, by_uri: bool = False) -> Orders:
        """Orders to go on; by the URI alone if wanted and possible."""
        by_uri = by_uri and self.look.exists("job.json")
        return self.orders("resume" if by_uri else "run", die_at)

    def die(self, orders: Orders) -> None:
        """Run a driver that kills itself, and see that it does and that no fact is lost by it."""
        kept = self.look.commits()
        code = crash_points.run(orders)
        assert code == KILLED, f"{orders.die_at} never came: {orders.said.read_text()}"
        self.assert_kept(kept)

    def finish(self, *, by_uri: bool = False) -> None:
        """Run a driver that nobody disturbs."""
        kept = self.look.commits()
        orders = self.again(by_uri=by_uri)
        assert crash_points.run(orders) == EXIT_QUARANTINED, orders.said.read_text()
        self.assert_kept(kept)

    def assert_kept(self, kept: dict[str, bytes]) -> None:
        """What was committed stands byte for byte, so nobody decided it again."""
        now = self.look.commits()
        assert {key: now.get(key) for key in kept} == kept

    def assert_as_undisturbed(self) -> None:
        """The final set: rows, pictures, records, and nothing besides."""
        look, reference = self.look, self.reference
        look.check_sound()
        assert look.rows() == reference.rows
        assert look.pngs() == reference.pngs
        assert look.exists(GENERATION.success_key)
        assert look.num_commits() == reference.num_shards
        assert not look.lacks_pngs()

    def assert_little_left(self, deaths: Sequence[Point]) -> None:
        """Files that no listing shows: one for each death between a link and its rename only."""
        num_most = sum(point.step == crash_points.UNRENAMED for point in deaths)
        assert len(self.look.unfinished_files()) == num_most

    def copy_to(self, url: str) -> "KilledJob":
        """The same job elsewhere, as far as it has come."""
        source, target = self.look.store, open_store(url, create=True)
        for item in source.list():
            target.put(item.key, source.read(item.key))
        return KilledJob(self.reference, replace(self.look, url=url), self.environment)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A kind of run that is killed.

    Attributes:
        name: For people.
        deaths: Where the drivers before it died.
        rival: Whether another planner is faster.
        repeat_every: Which shards are published twice.
        kinds: Of objects whose points are wanted; empty for all.
    """

    name: str
    deaths: tuple[Point, ...] = ()
    rival: bool = False
    repeat_every: int = 0
    kinds: frozenset[str] = frozenset()

    def prepare(self, job: KilledJob) -> None:
        """Let the drivers before it die."""
        for point in self.deaths:
            job.die(job.orders(die_at=point))

    def orders(self, job: KilledJob, die_at: Point | None = None) -> Orders:
        """Orders for the run."""
        return job.orders(die_at=die_at, rival=self.rival, repeat_every=self.repeat_every)

    def points(self, job: KilledJob) -> list[Point]:
        """Every point of the run, in order; ``job`` is prepared and comes to its end."""
        orders = replace(
            self.orders(job), points=job.reference.folder / f"{uuid.uuid4().hex}.points"
        )
        assert crash_points.run(orders) == EXIT_QUARANTINED, orders.said.read_text()
        points = crash_points.points_of(orders)
        return [point for point in points if self._wants(point.label)]

    def _wants(self, label: str) -> bool:
        return not self.kinds or label.partition(" ")[2] in self.kinds


FRESH = Scenario(name="fresh")
# What the dead leave: a part of a plan that nobody names, data that nobody names, a committed
# shard without pictures.
RESUMED = Scenario(
    name="resumed",
    deaths=(
        Point("put plan part", 1, crash_points.AFTER),
        Point("put data", 1, crash_points.AFTER),
        Point("create commit record", 1, crash_points.AFTER),
        Point("put data", 1, crash_points.AFTER),
    ),
)
CONTESTED = Scenario(
    name="contested",
    rival=True,
    repeat_every=2,
    kinds=frozenset({"plan part", "plan", "data", "commit record"}),
)
SCENARIOS = (FRESH, RESUMED, CONTESTED)


def crash_at_each(
    scenario: Scenario,
    reference: Reference,
    new_url: Callable[[], str],
    environment: dict[str, str] | None = None,
    *,
    share: Share,
) -> tuple[list[Point], int]:
    """Die at every point of a scenario, each in a job of its own, and resume.

    Returns:
        The points that the share was enough for, and how many there are.
    """
    prepared = reference.job(new_url(), environment)
    scenario.prepare(prepared)
    points = scenario.points(prepared.copy_to(new_url()))
    # So that those of a share that is too small are not the first ones.
    random.Random(len(points)).shuffle(points)
    done = []
    for number in share.rounds(len(points)):
        point = points[number]
        job = prepared.copy_to(new_url())
        job.die(scenario.orders(job, point))
        job.finish(by_uri=number % 2 == 0)
        job.assert_as_undisturbed()
        job.assert_little_left([point])
        job.look.store.delete(item.key for item in list(job.look.store.list()))
        done.append(point)
    return done, len(points)


def crash_in_turn(job: KilledJob, scenario: Scenario, points: Sequence[Point]) -> None:
    """Die at one point after the other of one job; then resume it to its end."""
    for number, point in enumerate(points):
        orders = scenario.orders(job, point)
        if number % 2 and job.look.exists("job.json"):
            orders = replace(orders, arguments=job.orders("resume").arguments)
        job.die(orders)
    job.finish(by_uri=True)
    job.assert_as_undisturbed()
    job.assert_little_left(points)
