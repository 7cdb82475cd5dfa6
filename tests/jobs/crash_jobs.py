"""Small jobs whose drivers are killed and started again, and what an undisturbed one makes."""

import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jobs.cli
from jobs.spec import check_spec
from pipeline.layout import MANIFEST_PREFIX, Generation
from pipeline.sinks.parquet import read_rows
from pipeline.storage import Store, open_store
from segformer3d.weights import untrained_weights
from tests.budget import Share
from tests.integration.jobs_under_test import GENERATION, JobUnderTest, Row
from tests.jobs import crash_points
from tests.jobs.crash_points import Orders, Point
from tests.jobs.job_parts import TINY
from tests.jobs.local_graph import Footage, without_ray
from tests.media import encode_image, picture, write_video

EXIT_DONE, EXIT_FAILED, EXIT_QUARANTINED, EXIT_INTERRUPTED, KILLED = 0, 1, 3, 130, -9
# What is no longer there when a job is repaired.
GONE = "still-000.jpg"
Verb = Literal["run", "resume", "repair"]
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
        decided: Keys of all that says that something of it is done.
        wrecked: URL of a finished job that was wrecked since: what is to be repaired begins as a
            copy of it, and the other fields say how that ends. Empty if there is none.
    """

    folder: Path
    archive: Path
    weights: Path
    footage: Path
    rows: list[Row]
    pngs: dict[str, str]
    num_shards: int
    decided: frozenset[str] = frozenset()
    wrecked: str = ""

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
    return replace(
        bare, rows=rows, pngs=pngs, num_shards=plan.num_shards, decided=job.look.decided()
    )


def make_wrecked_reference(folder: Path) -> Reference:
    """A job that is finished and then wrecked, and what an undisturbed repair makes of it."""
    reference = make_reference(folder)
    finished = reference.job(str(folder / "undisturbed"))
    wrecked = finished.copy_to(str(folder / "wrecked"))
    wreck(wrecked.look.store)
    (reference.archive / GONE).unlink()
    repaired = wrecked.copy_to(str(folder / "repaired"))
    footage = Footage.load(reference.footage)
    with footage.used(), without_ray():
        assert jobs.cli.run(repaired.orders("repair").arguments) == EXIT_DONE
    footage.save(reference.footage)
    repaired.look.check_sound()
    rows, pngs = repaired.look.rows(), repaired.look.pngs()
    assert sum(row not in reference.rows for row in rows) == 1
    assert [row[2] for row in rows].count("not_found") == 1
    lost = {key for key in reference.pngs if key.startswith(f"png/{GONE}_")}
    assert pngs == {key: png for key, png in reference.pngs.items() if key not in lost}
    return replace(
        reference,
        rows=rows,
        pngs=pngs,
        decided=repaired.look.decided(),
        wrecked=wrecked.look.url,
    )


def wreck(store: Store) -> None:
    """Do to a finished job some of everything that a repair mends."""
    (lost,) = (
        item.key
        for item in store.list(GENERATION.data_prefix)
        if GONE in [row["asset"] for row in read_rows(store.read(item.key), ["asset"])]
    )
    snapshot = max(item.key for item in store.list(MANIFEST_PREFIX))
    store.delete([lost])
    store.put(snapshot, store.read(snapshot)[:-1])
    store.put("png/clip.mp4/000000_color.png", b"no picture")
    # What nobody goes by, and the next driver deletes.
    store.put(GENERATION.data_key(0, "c" * 32), b"lost a race")
    store.put(GENERATION.plan_part_key("d" * 32, 0), b"lost a race")


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

    def orders(self, verb: Verb = "run", die_at: Point | None = None, **more: object) -> Orders:
        """Orders for a driver: ``run`` with all settings, the others with the URI alone."""
        arguments = [verb, self.look.url]
        if verb == "repair":
            arguments = ["verify", self.look.url, "--repair"]
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

    def repair(self) -> None:
        """Go on with a repair, as its user does: resume what is planned, then repair the rest."""
        kept = self.look.commits()
        if self.has_planned_repair:
            self.finish(by_uri=True)
        orders = self.orders("repair")
        assert crash_points.run(orders) == EXIT_DONE, orders.said.read_text()
        self.assert_kept(kept)

    @property
    def has_planned_repair(self) -> bool:
        """Whether the generation of a repair is planned, which a resume goes on with."""
        return self.look.exists(Generation(1).plan_key)

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
        assert look.decided() == reference.decided

    def assert_little_left(self, deaths: Sequence[Point]) -> None:
        """Files that no listing shows: one for each death between a link and its rename only."""
        num_most = sum(point.step == crash_points.UNRENAMED for point in deaths)
        assert len(self.look.unfinished_files()) == num_most

    def copy_to(self, url: str) -> "KilledJob":
        """The same job elsewhere, as far as it has come."""
        _copy(self.look.store, open_store(url, create=True))
        return KilledJob(self.reference, replace(self.look, url=url), self.environment)


def _copy(source: Store, target: Store) -> None:
    for item in source.list():
        target.put(item.key, source.read(item.key))


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A kind of run that is killed.

    Attributes:
        name: For people.
        verb: What its drivers are told.
        code: The exit code of one that nobody kills.
        deaths: Where the drivers before it died.
        rival: Whether another planner is faster.
        troubled: As of ``Orders``.
        repeat_every: Which shards are published twice.
        kinds: Of objects whose points are wanted; empty for all.
    """

    name: str
    verb: Literal["run", "repair"] = "run"
    code: int = EXIT_QUARANTINED
    deaths: tuple[Point, ...] = ()
    rival: bool = False
    troubled: bool = False
    repeat_every: int = 0
    kinds: frozenset[str] = frozenset()

    def prepare(self, job: KilledJob) -> None:
        """Let the drivers before it die, or be done and the job wrecked."""
        if self.verb == "repair":
            _copy(open_store(job.reference.wrecked), job.look.store)
        for point in self.deaths:
            job.die(job.orders(die_at=point))

    def orders(
        self, job: KilledJob, die_at: Point | None = None, *, by_uri: bool = False
    ) -> Orders:
        """Orders for the run, which may go on from where another one died."""
        verb: Verb = self.verb
        if job.has_planned_repair or (verb == "run" and by_uri and job.look.exists("job.json")):
            verb = "resume"
        return job.orders(
            verb,
            die_at,
            rival=self.rival,
            troubled=self.troubled,
            repeat_every=self.repeat_every,
        )

    def finish(self, job: KilledJob, *, by_uri: bool) -> None:
        """Let nobody disturb the job any more."""
        if self.verb == "repair":
            job.repair()
        else:
            job.finish(by_uri=by_uri)

    def points(self, job: KilledJob) -> list[Point]:
        """Every point of the run, in order; ``job`` is prepared and comes to its end."""
        orders = replace(
            self.orders(job), points=job.reference.folder / f"{uuid.uuid4().hex}.points"
        )
        assert crash_points.run(orders) == self.code, orders.said.read_text()
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
TROUBLED = Scenario(
    name="troubled",
    code=EXIT_INTERRUPTED,
    troubled=True,
    kinds=frozenset({"death", "cancel marker"}),
)
SCENARIOS = (FRESH, RESUMED, CONTESTED, TROUBLED)
REPAIRED = Scenario(name="repaired", verb="repair", code=EXIT_DONE)


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
        scenario.finish(job, by_uri=number % 2 == 0)
        job.assert_as_undisturbed()
        job.assert_little_left([point])
        job.look.store.delete(item.key for item in list(job.look.store.list()))
        done.append(point)
    return done, len(points)


def crash_in_turn(job: KilledJob, scenario: Scenario, points: Sequence[Point]) -> None:
    """Die at one point after the other of one job; then resume it to its end."""
    for number, point in enumerate(points):
        job.die(scenario.orders(job, point, by_uri=number % 2 == 1))
    scenario.finish(job, by_uri=True)
    job.assert_as_undisturbed()
    job.assert_little_left(points)
