"""A three-node Ray cluster that is broken in one way or another while a job runs on it."""

import contextlib
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from pipeline.layout import shard_of
from tests.budget import Share
from tests.integration.cluster import LoopbackCluster, RayNode, running_cluster, send
from tests.integration.jobs_under_test import (
    Driver,
    JobUnderTest,
    Row,
    make_archive,
    make_weights,
    wait_for,
)
from tests.integration.traced_cli import TRACE_FOLDER, Event, read_trace, trace_path

NUM_ROUNDS = 50
# In so many, some node that was frozen must have been given up before it woke.
ENOUGH_ROUNDS = 10
# Where another run of this test ended, so that one may go on with what that left.
FIRST_ROUND = int(os.environ.get("CHAOS_FIRST_ROUND", "0"))
# Of each kind of fault.
SHARE = Share(6)
SEED = 20261127
NUM_NODES = 3
NODE = {"num_cpus": 1}
# Shards of one frame, of stills and of groups of pictures: many, so that there is time to strike.
NUM_FRAMES, NUM_STILLS = 30, 100
# Staged, which has a worker of each kind to lose, and whose stages can be traced.
SETTINGS = ("geometry.short_side_px=256", "shard.frames=1", "ray.graph=staged")
FROZEN_S = 15.0
DRAIN_S = 8.0
RAY_ENVIRONMENT = {
    # So that a node that is frozen for 15 s is declared dead meanwhile; Ray's own patience is over
    # a minute, and such a freeze would go unnoticed.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2500",
    "RAY_health_check_failure_threshold": "3",
    # A node of one CPU would end its idle workers after a second and start others all the time.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
}
# The watchdog: a run that lasts longer from the fault on is taken to hang.
END_S = 300.0
START_S = 400.0
EXIT_FAILED, EXIT_INTERRUPTED = 1, 130

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(SHARE.timeout_s),
]


@dataclass(frozen=True, kw_only=True)
class Strike:
    """What a fault did.

    Attributes:
        began_at: When it was about to be done, in seconds since 1970.
        ended_at: When it was done.
        pids: Whom it met.
    """

    began_at: float
    ended_at: float
    pids: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one round showed.

    Attributes:
        seconds: From the fault to the end of the driver it met.
        code: That driver's exit code.
        num_before: Shards committed when the fault came.
        in_flight: Shards begun by then whose receipts the driver had not got; likewise when it
            stopped, if it did.
        again: Shards that the model saw more than once.
        num_extra: How many times more than once, over all shards.
        committed_again: Shards that the model saw although they were committed before the fault.
        num_undead: What processes that were declared dead began or ended after that.
        was_given_up: Whether the cluster had given up the node that was frozen.
    """

    seconds: float
    code: int
    num_before: int
    in_flight: frozenset[int]
    again: frozenset[int]
    num_extra: int
    committed_again: frozenset[int]
    num_undead: int
    was_given_up: bool

    @property
    def has_zombie(self) -> bool:
        """Whether processes of a node that had been given up woke and went on."""
        return self.was_given_up and self.num_undead > 0


@dataclass
class Field:
    """Where the rounds are fought: a cluster, and what jobs on it are made of."""

    archive: Path
    weights: Path
    folder: Path
    clusters: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    cluster: LoopbackCluster | None = None

    def held(self) -> LoopbackCluster:
        """The cluster with all its nodes; a new one if there is none."""
        if self.cluster is None:
            context = running_cluster(
                [NODE] * NUM_NODES,
                dashboard=False,
                harmed=True,
                **RAY_ENVIRONMENT,
                **{TRACE_FOLDER: os.environ[TRACE_FOLDER]},
            )
            self.cluster = self.clusters.enter_context(context)
        return self.cluster

    def leave(self) -> None:
        """End the cluster: what comes next starts another."""
        self.clusters.close()
        self.cluster = None

    def job(self, url: str) -> JobUnderTest:
        """A job whose drivers join the cluster."""
        cluster = self.held()
        return JobUnderTest(
            archive=str(self.archive),
            url=url,
            weights=self.weights,
            folder=self.folder / "said" / uuid4().hex[:8],
            settings=SETTINGS,
            module="tests.integration.traced_cli",
            environment={"RAY_ADDRESS": cluster.address, **cluster.environment()},
        )


@pytest.fixture(scope="module")
def field_of_battle(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """Begun after the S3 server, whose address and keys the workers inherit."""
    folder = tmp_path_factory.mktemp("chaos")
    (folder / "trace").mkdir()
    archive = make_archive(folder / "archive", num_frames=NUM_FRAMES, num_stills=NUM_STILLS)
    weights = make_weights(folder / "tiny.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TRACE_FOLDER, str(folder / "trace"))
        found = Field(archive=archive, weights=weights, folder=folder)
        with found.clusters:
            yield found


@pytest.fixture(scope="module")
def undisturbed(field_of_battle: Field) -> list[Row]:
    """Rows of a run that nobody disturbs."""
    job = field_of_battle.job(str(field_of_battle.folder / "undisturbed"))
    with job.nothing_left(), running(job.run()) as driver:
        assert driver.end(START_S + END_S) == 0, driver.said
    job.check_sound()
    assert Counter(annotated(read_trace(trace_path(job.url)))).most_common(1)[0][1] == 1
    return job.rows()


def strike_actor(field_: Field, job: JobUnderTest, rng: random.Random) -> list[Strike]:
    """The kernel's memory killer, for one, takes a process that holds a model."""
    return [kill_one(job, rng, {"annotate"})]


def strike_worker(field_: Field, job: JobUnderTest, rng: random.Random) -> list[Strike]:
    """It takes one that decodes or publishes, at work if there is one."""
    return [kill_one(job, rng, {"decode", "publish"})]


def strike_node(field_: Field, job: JobUnderTest, rng: random.Random) -> list[Strike]:
    """A machine is gone; every other time another comes at once."""
    cluster = field_.held()
    node = rng.choice(cluster.nodes()[1:])
    struck = kill_node(node)
    cluster.remove(node)
    if rng.random() < 0.5:
        cluster.add_node(**NODE)
    return [struck]


def strike_frozen(field_: Field, job: JobUnderTest, rng: random.Random) -> list[Strike]:
    """A machine stands still, is given up, and goes on as if nothing had been."""
    node = rng.choice(field_.held().nodes()[1:])
    began_at = time.time()
    pids = frozenset(process.pid for process in node.tree())
    with node.frozen():
        ended_at = time.time()
        time.sleep(FROZEN_S)
    return [Strike(began_at=began_at, ended_at=ended_at, pids=pids)]


def strike_drained(field_: Field, job: JobUnderTest, rng: random.Random) -> list[Strike]:
    """A cloud takes a machine back: a warning, a few seconds, the end."""
    cluster = field_.held()
    node = rng.choice(cluster.nodes()[1:])
    began_at = time.time()
    cluster.drain(node, DRAIN_S)
    warned = Strike(began_at=began_at, ended_at=time.time(), pids=frozenset())
    time.sleep(DRAIN_S)
    struck = kill_node(node)
    cluster.remove(node)
    return [warned, struck]


def strike_head(field_: Field, job: JobUnderTest, rng: random.Random) -> list[Strike]:
    """The head's machine is gone, or, every other time, the head's directory alone."""
    head = field_.held().nodes()[0]
    assert head.gcs_pid is not None
    if rng.random() < 0.5:
        return [kill_node(head)]
    began_at = time.time()
    send([head.gcs_pid], signal.SIGKILL)
    return [Strike(began_at=began_at, ended_at=time.time(), pids=frozenset({head.gcs_pid}))]


def kill_node(node: RayNode) -> Strike:
    began_at = time.time()
    pids = frozenset(process.pid for process in node.tree())
    node.kill()
    return Strike(began_at=began_at, ended_at=time.time(), pids=pids)


def kill_one(job: JobUnderTest, rng: random.Random, stages: set[str]) -> Strike:
    """Kill a worker that does one of these, right in the middle of it if there is one."""
    events = [event for event in read_trace(trace_path(job.url)) if event.stage in stages]
    latest = {event.pid: event for event in events}
    alive = sorted(pid for pid in latest if psutil.pid_exists(pid))
    at_work = [pid for pid in alive if latest[pid].begins]
    pid = rng.choice(at_work or alive)
    began_at = time.time()
    os.kill(pid, signal.SIGKILL)
    return Strike(began_at=began_at, ended_at=time.time(), pids=frozenset({pid}))


STRIKES: dict[str, Callable[[Field, JobUnderTest, random.Random], list[Strike]]] = {
    "actor": strike_actor,
    "worker": strike_worker,
    "node": strike_node,
    "frozen": strike_frozen,
    "drained": strike_drained,
    "head": strike_head,
}


@pytest.mark.parametrize("kind", [*STRIKES])
def test_a_broken_cluster_loses_nothing_and_does_little_twice(
    kind: str, field_of_battle: Field, undisturbed: list[Row], tmp_path: Path
) -> None:
    rounds = []
    for number in SHARE.rounds(NUM_ROUNDS, first=FIRST_ROUND):
        rng = random.Random(f"{SEED} {kind} {number}")
        on_s3 = number % 2 == 1
        url = f"s3://out/{uuid4().hex}" if on_s3 else str(tmp_path / f"job-{number}")
        job = field_of_battle.job(url)
        try:
            with job.nothing_left():
                found = fight(field_of_battle, job, kind, rng)
        except BaseException:
            # Nobody knows in which state it is.
            field_of_battle.leave()
            raise
        job.check_sound()
        assert job.rows() == undisturbed
        assert found.again <= found.in_flight
        assert found.num_extra <= len(found.in_flight)
        assert not found.committed_again
        rounds.append(found)
        print(
            f"{kind} {number + 1}{' on S3' if on_s3 else ''}: {found.num_before} committed, "
            f"{len(found.in_flight)} in flight, exit code {found.code} after "
            f"{found.seconds:.1f} s, {found.num_extra} shards again, "
            f"{found.num_undead} steps of the undead"
            f"{', its node had been given up' if found.was_given_up else ''}"
        )
    print(proof(kind, rounds))
    if kind == "frozen" and len(rounds) >= ENOUGH_ROUNDS:
        assert any(item.has_zombie for item in rounds), "no node was given up and woke"


def fight(field_: Field, job: JobUnderTest, kind: str, rng: random.Random) -> Round:
    """One run that meets one fault, and the resume if it stops; leaves the cluster whole."""
    with running(job.run()) as driver:
        num_shards = wait_for_commits(job, driver, rng.uniform(0.1, 0.6))
        time.sleep(rng.uniform(0, 0.5))
        assert driver.is_alive, f"the fault came too late: {driver.said}"
        before = committed(job)
        strikes = STRIKES[kind](field_, job, rng)
        code = end_in_time(driver, job)
    ended_at = time.time()
    seconds = ended_at - strikes[0].began_at
    assert code in ({EXIT_INTERRUPTED} if kind == "head" else {0, EXIT_FAILED}), driver.said
    if code == 0:
        assert driver.result()["outcome"] == "done"
        assert driver.result()["num_done"] == num_shards
    else:
        check_last_words(driver)
    was_given_up = mend(field_, kind, strikes)
    if code != 0:
        # What was in flight when it stopped is done again too; workers may outlive it a little.
        stop = Strike(began_at=ended_at, ended_at=time.time(), pids=frozenset())
        strikes = [stop, *strikes]
        resume(field_, job, num_shards)
    events = read_trace(trace_path(job.url))
    return judge(events, strikes, before, seconds, code, was_given_up=was_given_up)


@contextlib.contextmanager
def running(driver: Driver) -> Iterator[Driver]:
    """See to it that a driver ends, whatever is found of it."""
    try:
        yield driver
    finally:
        driver.process.kill()
        driver.process.wait()


def wait_for_commits(job: JobUnderTest, driver: Driver, share: float) -> int:
    """Wait until so much is committed; gives the number of shards."""
    wait_for(
        lambda: not driver.is_alive or (job.exists("job.json") and job.plan() is not None),
        START_S,
        lambda: driver.said,
    )
    plan = job.plan()
    assert plan is not None, driver.said
    enough = max(1, round(share * plan.num_shards))
    wait_for(
        lambda: not driver.is_alive or job.num_commits() >= enough, START_S, lambda: driver.said
    )
    return plan.num_shards


def committed(job: JobUnderTest) -> frozenset[int]:
    return frozenset(shard for key in job.commits() if (shard := shard_of(key)) is not None)


def end_in_time(driver: Driver, job: JobUnderTest) -> int:
    """The watchdog."""
    wait_for(
        lambda: not driver.is_alive,
        END_S,
        lambda: f"hangs with {job.num_commits()} commits, stuck in {stuck(job)}: {driver.said}",
    )
    return driver.process.returncode


def stuck(job: JobUnderTest) -> dict[int, Event]:
    latest = {event.shard_id: event for event in read_trace(trace_path(job.url))}
    return {shard: event for shard, event in latest.items() if event.stage != "receipt"}


def check_last_words(driver: Driver) -> None:
    """One line says what happened and that the job can be resumed; no traceback, no result."""
    assert driver.out.read_text() == ""
    lines = [line for line in driver.said.splitlines() if line.startswith("segformer3d: ")]
    assert len(lines) == 1, driver.said
    assert "what is committed stays" in lines[0]
    assert "resume" in lines[0]
    assert "Traceback" not in driver.said


def mend(field_: Field, kind: str, strikes: list[Strike]) -> bool:
    """Give the cluster back what it lost; says whether a frozen node had been given up."""
    if kind == "head":
        field_.leave()
        return False
    cluster = field_.held()
    was_given_up = False
    for node in cluster.nodes():
        if kind == "frozen" and node.raylet_pid in strikes[-1].pids:
            # One that wakes and is told so ends itself.
            was_given_up = not node.is_alive
            cluster.remove(node)
    while len(cluster.nodes()) < NUM_NODES:
        cluster.add_node(**NODE)
    return was_given_up


def resume(field_: Field, job: JobUnderTest, num_shards: int) -> None:
    """Go on, on a new cluster if the old one is gone; nothing decided is decided again."""
    kept = job.commits()
    cluster = field_.held()
    again = JobUnderTest(
        archive=job.archive,
        url=job.url,
        weights=job.weights,
        folder=job.folder,
        module=job.module,
        mark=job.mark,
        environment={"RAY_ADDRESS": cluster.address, **cluster.environment()},
    )
    with running(again.resume()) as driver:
        assert driver.end(START_S + END_S) == 0, driver.said
    assert driver.result()["num_computed"] == num_shards - len(kept)
    assert kept.items() <= job.commits().items()


def judge(
    events: list[Event],
    strikes: list[Strike],
    before: frozenset[int],
    seconds: float,
    code: int,
    *,
    was_given_up: bool,
) -> Round:
    first = min(strike.ended_at for strike in strikes)
    last = strikes[-1]
    in_flight: set[int] = set()
    for strike in strikes:
        begun = {event.shard_id for event in events if event.at <= strike.ended_at}
        received = {
            event.shard_id
            for event in events
            if event.stage == "receipt" and event.at <= strike.began_at
        }
        in_flight |= begun - received
    times = Counter(annotated(events))
    return Round(
        seconds=seconds,
        code=code,
        num_before=len(before),
        in_flight=frozenset(in_flight),
        again=frozenset(shard for shard, number in times.items() if number > 1),
        num_extra=sum(number - 1 for number in times.values()),
        committed_again=before & set(annotated(events, since=first)),
        num_undead=sum(event.pid in last.pids and event.at > last.ended_at for event in events),
        was_given_up=was_given_up,
    )


def annotated(events: list[Event], since: float = 0) -> list[int]:
    """Shards that the model was given, as often as it was."""
    return [
        event.shard_id
        for event in events
        if event.stage == "annotate" and event.begins and event.at > since
    ]


def proof(kind: str, rounds: list[Round]) -> str:
    seconds = [item.seconds for item in rounds]
    in_flight = [len(item.in_flight) for item in rounds]
    extra = [item.num_extra for item in rounds]
    return (
        f"PROOF chaos {kind}: {len(rounds)} of {NUM_ROUNDS} rounds on {NUM_NODES} nodes, "
        f"from the fault to the end median {statistics.median(seconds):.0f} s, "
        f"longest {max(seconds):.0f} s; "
        f"{sum(item.code == 0 for item in rounds)} ran on, "
        f"{sum(item.code != 0 for item in rounds)} stopped and were resumed; "
        f"in flight {min(in_flight)} to {max(in_flight)} shards a round, computed again "
        f"{sum(extra)} in all, {max(extra)} in a round at the most; committed and computed again "
        f"{sum(len(item.committed_again) for item in rounds)}; rows lost or twice 0; "
        f"steps of processes declared dead {sum(item.num_undead for item in rounds)}, "
        f"nodes given up that woke and went on {sum(item.has_zombie for item in rounds)}"
    )
