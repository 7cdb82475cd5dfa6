"""What kills the model's process is found out by those who come after, and by nobody else."""

import os
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from pipeline.deaths import Deaths, Journal, spare
from pipeline.layout import Generation, death_of
from pipeline.stages import AnnotateShard
from pipeline.storage import open_store
from pipeline.tables import AnnotatedShard
from segformer3d.weights import untrained_weights
from tests.jobs.job_parts import TINY
from tests.predictions import assert_same_class_ids
from tests.shards import grey_shard, stage_context

LAYOUT = Generation()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path / "job"), create=True)


def in_a_process(task):
    """Do it in a process of its own; how that ended."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            # OpenMP's threads are not there in a forked child, and to wait for them is for ever.
            torch.set_num_threads(1)
            task()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def let_go(journal):
    """Give its locks up, as its process's death would."""
    for file in [*journal._free, *journal._taken.values()]:
        os.close(file)


def die_at(store, lease, shard_id, place="shard"):
    def task():
        Journal(store, LAYOUT, lease).note(shard_id, place)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(task) == -signal.SIGKILL


def test_a_death_is_found_by_who_comes_next(store):
    die_at(store, 1, 5)
    assert Journal(store, LAYOUT, 1).deaths(5) == Deaths(in_whole=1)
    die_at(store, 1, 5, 3)
    die_at(store, 1, 5, 3)
    journal = Journal(store, LAYOUT, 1)
    assert journal.deaths(5) == Deaths(at_frame=((3, 2),), in_whole=1)
    assert not journal.deaths(4)
    keys = [item.key for item in store.list(LAYOUT.attempts_prefix)]
    assert sorted(map(death_of, keys), key=str) == [(5, "shard"), (5, 3), (5, 3)]


def test_the_count_outlives_the_driver(store):
    die_at(store, 1, 5, 3)
    Journal(store, LAYOUT, 1)
    assert Journal(store, LAYOUT, 2).deaths(5) == Deaths(at_frame=((3, 1),))


def test_who_went_with_its_driver_accuses_nobody(store):
    die_at(store, 1, 5, 3)
    assert not Journal(store, LAYOUT, 2).deaths(5)


def test_two_drivers_on_a_machine_do_not_lose_each_other_s_deaths(store):
    die_at(store, 1, 5, 3)
    assert not Journal(store, LAYOUT, 2).deaths(5)
    assert Journal(store, LAYOUT, 1).deaths(5) == Deaths(at_frame=((3, 1),))


def test_old_notes_of_other_drivers_are_swept_up(store, tmp_path):
    die_at(store, 1, 5, 3)
    (note,) = (tmp_path / f"segformer3d-{os.getuid()}").iterdir()
    os.utime(note, (0, 0))
    Journal(store, LAYOUT, 2)
    assert not note.exists()
    assert not Journal(store, LAYOUT, 1).deaths(5)


def test_who_lives_or_was_at_rest_accuses_nobody(store, tmp_path):
    alive = Journal(store, LAYOUT, 1)
    alive.note(5)

    def task():
        journal = Journal(store, LAYOUT, 1)
        journal.note(6)
        journal.rest(6)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(task) == -signal.SIGKILL
    seen = Journal(store, LAYOUT, 1)
    assert not seen.deaths(5)
    assert not seen.deaths(6)
    notes = list((tmp_path / f"segformer3d-{os.getuid()}").iterdir())
    assert len(notes) == 2


def test_another_job_is_none_of_our_business(store, tmp_path):
    die_at(store, 1, 5, 3)
    other = open_store(str(tmp_path / "other"), create=True)
    assert not Journal(other, LAYOUT, 1).deaths(5)
    assert Journal(store, LAYOUT, 1).deaths(5)


def test_a_folder_that_others_may_write_to_is_not_used(store, tmp_path):
    folder = tmp_path / f"segformer3d-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    die_at(store, 1, 5, 3)
    assert list(folder.iterdir()) == []
    assert Journal(store, LAYOUT, 1).deaths(5) == Deaths(at_frame=((3, 1),))


@pytest.mark.parametrize("target", [None, "nowhere", "elsewhere"])
def test_who_takes_the_folder_s_name_stops_no_count(store, tmp_path, target):
    place = tmp_path / f"segformer3d-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if target is None:
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / target)
    die_at(store, 1, 5, 3)
    assert Journal(store, LAYOUT, 1).deaths(5) == Deaths(at_frame=((3, 1),))
    assert list(elsewhere.iterdir()) == []


def test_only_the_guilty_are_spared_and_the_rest_keep_their_pixels():
    shard = grey_shard([10, 20, 30, 40, 50], bad=(1,))
    assert spare(shard, Deaths(at_frame=((2, 1),), between=2)) is shard
    spared = spare(shard, Deaths(at_frame=((2, 2), (3, 1)), in_whole=1))
    assert [frame.error_kind for frame in spared.frames] == [None, "corrupt", "crash", None, None]
    assert spared.pixels[:, 0, 0, 0].tolist() == [10, 40, 50]
    none_left = spare(shard, Deaths(between=3))
    kinds = ["crash", "corrupt", "crash", "crash", "crash"]
    assert [frame.error_kind for frame in none_left.frames] == kinds
    assert none_left.pixels.shape == (0, 64, 96, 3)


def test_deaths_of_drivers_side_by_side_give_up_no_shard(store):
    for lease in (1, 3, 5):
        die_at(store, lease, 0)
    for lease in (1, 3, 5):
        journal = Journal(store, LAYOUT, lease)
    deaths = journal.deaths(0)
    assert deaths == Deaths(in_whole=3)
    assert deaths
    assert deaths.guilty(64) == frozenset()
    # Once its frames go one by one, those that happen between them count.
    for _ in range(3):
        die_at(store, 1, 0, "between")
    assert Journal(store, LAYOUT, 1).deaths(0).guilty(64) == frozenset(range(64))


def test_more_deaths_at_one_frame_than_count_make_no_other_guilty():
    deaths = Deaths(at_frame=((3, 20), (4, 20)))
    assert deaths.guilty(64) == {3, 4}


def test_what_is_known_to_kill_is_looked_at_anew(store):
    die_at(store, 1, 5)
    journal = Journal(store, LAYOUT, 2)
    assert not journal.deaths(5)
    Journal(store, LAYOUT, 1)
    journal._listed_s = float("-inf")
    assert journal.deaths(5) == Deaths(in_whole=1)
    die_at(store, 1, 5, 3)
    Journal(store, LAYOUT, 1)
    assert journal.deaths(5) == Deaths(at_frame=((3, 1),), in_whole=1)


def test_a_death_after_the_frames_went_one_by_one_is_one_between_them(store, monkeypatch):
    shard = grey_shard([1, 2])
    table = shard.to_table()

    def die(_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(AnnotatedShard, "to_table", die)
    monkeypatch.setattr("pipeline.stages.is_draining", lambda _: False)
    for _ in range(2):
        assert in_a_process(lambda: stage(store)(table)) == -signal.SIGKILL
    assert Journal(store, LAYOUT, 1).deaths(7) == Deaths(in_whole=1, between=1)


def test_a_shard_of_nothing_but_deadly_frames_is_given_up():
    deaths = Deaths(at_frame=tuple((place, 2) for place in range(20)), in_whole=1)
    assert deaths.guilty(64) == frozenset(range(64))
    fewer = Deaths(at_frame=deaths.at_frame[1:], in_whole=1)
    assert fewer.guilty(64) == frozenset(range(1, 20))


FATAL = 255


def stage(store, lease=1, at_a_time=1):
    """The real stage with the real journal; some frames are the death of its process."""
    context = stage_context(store, lease)
    journal = Journal(store, LAYOUT, lease, at_a_time=at_a_time)
    return AnnotateShard(context, untrained_weights(TINY), journal)


def deadly(made):
    start = made.predictor.start

    def die_or_start(frames, **options):
        if (frames[:, 0, 0, 0] == FATAL).any():
            os.kill(os.getpid(), signal.SIGKILL)
        return start(frames, **options)

    made.predictor.start = die_or_start
    return made


def confidences(annotated):
    return [item.confidence_mean for item in annotated.certainty]


def deaths_until_done(store, shard, most=20):
    for number in range(most):
        if in_a_process(lambda: deadly(stage(store)).annotate(shard)) == 0:
            return number
    pytest.fail("it never ends")


@pytest.mark.parametrize("values", [[9, FATAL, 30, 40], [FATAL], [1, 2, FATAL, 4, 5, FATAL]])
def test_three_attempts_and_the_frame_alone_is_quarantined(store, values):
    shard = grey_shard(values)
    fatal = [place for place, value in enumerate(values) if value == FATAL]
    # One as a whole, then two for each that is guilty.
    assert deaths_until_done(store, shard) == 1 + 2 * len(fatal)
    annotated = deadly(stage(store)).annotate(shard)
    kinds = [frame.error_kind for frame in annotated.frames]
    assert kinds == ["crash" if value == FATAL else None for value in values]
    innocent = grey_shard([value for value in values if value != FATAL])
    expected = AnnotateShard(stage(store).context, untrained_weights(TINY)).annotate(innocent)
    assert len(annotated.class_ids) == len(expected.class_ids)
    for mine, theirs in zip(annotated.class_ids, expected.class_ids, strict=True):
        assert_same_class_ids(mine, theirs)
    assert confidences(annotated) == pytest.approx(confidences(expected), rel=1e-4)
    # A resume needs no further death.
    resumed = deadly(stage(store, lease=2)).annotate(shard)
    assert [frame.error_kind for frame in resumed.frames] == kinds
    print(f"PROOF guilty frame: {len(fatal)} of {len(values)}, deaths {1 + 2 * len(fatal)}")


def tables_of(*shard_ids):
    return [replace(grey_shard([1, 2]), shard_id=number).to_table() for number in shard_ids]


def test_each_shard_under_way_is_noted_until_it_ends(store):
    def task():
        made = stage(store, at_a_time=3)
        ends = [made.begin(table) for table in tables_of(1, 2, 3)]
        ends[1]()
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_process(task) == -signal.SIGKILL
    journal = Journal(store, LAYOUT, 1)
    found = [journal.deaths(number).in_whole for number in (1, 2, 3)]
    assert found == [1, 0, 1]


@pytest.mark.parametrize(
    ("error", "deaths"),
    [
        (RuntimeError("no idea"), Deaths()),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), Deaths(in_whole=1)),
    ],
)
def test_what_fails_while_it_is_waited_for_is_a_death_if_the_device_is_lost(store, error, deaths):
    def wait():
        raise error

    made = stage(store)
    made.predictor.start = lambda *_, **__: wait
    end = made.begin(*tables_of(1))
    with pytest.raises(type(error)):
        end()
    let_go(made.journal)
    assert Journal(store, LAYOUT, 1).deaths(1) == deaths


def test_a_note_that_cannot_be_wiped_keeps_nobody_waiting(store, monkeypatch):
    journal = Journal(store, LAYOUT, 1)
    journal.note(1)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.deaths.os.pwrite", fail)
        with pytest.raises(OSError, match="injected"):
            journal.rest(1)
    journal.note(2)


def fail(*_):
    raise OSError("injected")


def begun_after_the_other_ends(made, first, second):
    """What the second says, which must not begin before the first ends."""
    end = made.begin(first)
    with ThreadPoolExecutor(1) as threads:
        begun = threads.submit(made.begin, second)
        with pytest.raises(TimeoutError):
            begun.result(0.3)
        end()
        return AnnotatedShard.from_table(begun.result()())


def test_a_deadly_shard_begins_when_no_other_is_under_way(store):
    die_at(store, 1, 2)
    annotated = begun_after_the_other_ends(stage(store, at_a_time=2), *tables_of(1, 2))
    assert [frame.error_kind for frame in annotated.frames] == [None, None]


def test_no_more_shards_are_begun_than_may_be_under_way(store):
    annotated = begun_after_the_other_ends(stage(store), *tables_of(1, 2))
    assert annotated.shard_id == 2


def test_an_ordinary_exception_is_no_death(store):
    made = stage(store)
    made.predictor.start = None
    with pytest.raises(TypeError):
        made.annotate(grey_shard([1]))
    let_go(made.journal)
    assert not Journal(store, LAYOUT, 1).deaths(7)


def test_a_lost_device_is_one(store):
    import torch

    made = stage(store)

    def lose(*_, **__):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    made.predictor.start = lose
    with pytest.raises(torch.AcceleratorError):
        made.annotate(grey_shard([1]))
    let_go(made.journal)
    assert Journal(store, LAYOUT, 1).deaths(7) == Deaths(in_whole=1)


def test_a_shard_stays_as_it_is_without_deaths(store):
    shard = grey_shard([1, 2])
    assert [frame.error_kind for frame in stage(store).annotate(shard).frames] == [None, None]
