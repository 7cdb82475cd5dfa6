"""Retries and repairs: a generation of their own, of exactly what was asked for."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import cli, repair, retry
from jobs.generations import History, read_part, read_plans
from jobs.job_dataset import JobDataset
from jobs.lease import Heartbeat, beat, take_lease
from jobs.runner import resume_job
from jobs.status import job_status
from jobs.verify import _Generation, verify_job
from pipeline.decode import probe_assets
from pipeline.errors import StoreUnavailableError
from pipeline.layout import Generation, attempt_of
from pipeline.stages import make_pngs
from pipeline.storage import StorageOptions, open_store
from pipeline.storage.local import LocalStore
from tests.jobs.job_parts import tiny_weights, where
from tests.jobs.local_graph import without_ray
from tests.media import encode_image, picture, tar_of, write_video

SIZE = (96, 64)
ANYWHERE = pytest.mark.parametrize("job_url", ["local", "S3"], indirect=True)
FIRST, SECOND, THIRD = Generation(0), Generation(1), Generation(2)


@pytest.fixture
def archive(tmp_path):
    """Six good stills, three bad files and a video, of which a frame is cut off."""
    folder = tmp_path / "archive"
    folder.mkdir()
    for index in range(6):
        (folder / f"{index}.jpg").write_bytes(still(index))
    (folder / "cut.jpg").write_bytes(still(7)[:-400])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.png").write_text("no picture" * 20)
    write_video(folder / "drive.mp4", num_frames=10, size=SIZE, gop=5)
    return folder


def still(seed):
    return encode_image(picture(*SIZE, seed), "JPEG")


@pytest.fixture
def call(tmp_path, capsys):
    """The real command line, over a plain loop instead of Ray."""
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(tiny_weights())
    with without_ray():
        yield lambda *arguments: said(capsys, cli.run([str(item) for item in arguments]))


def said(capsys, code):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, json.loads(captured.out) if captured.out.startswith(("{", "[")) else captured.err


@pytest.fixture
def job(job_url, call, archive):
    """The finished job: three frames are quarantined, one of each kind."""
    code, result = annotate(call, archive, job_url)
    assert (code, result["num_frames"], result["num_quarantined"]) == (3, 19, 3)
    return open_store(job_url)


def annotate(call, archive, url):
    arguments = ["run", "--input", archive, "--output", url, "--json"]
    arguments += ["--weights", archive.parent / "weights.safetensors"]
    for setting in ("geometry.short_side_px=64", "shard.frames=4", "output.png=true"):
        arguments += ["--set", setting]
    return call(*arguments)


def objects(store, generation=FIRST):
    """Every object of a generation with its bytes."""
    return {item.key: store.read(item.key) for item in store.list(generation.prefix)}


def outcomes(store):
    """Status of every frame by the rule that the newest row counts, from the bare Parquet."""
    found = {}
    for generation, plan in read_plans(store):
        for path in plan.reopened:
            found.pop((path, -1), None)
        if not plan.num_shards:
            continue
        keys = [item.key for item in store.list(generation.data_prefix)]
        tables = [pq.read_table(pa.BufferReader(store.read(key))) for key in keys]
        for row in pa.concat_tables(tables).to_pylist():
            for key in [key for key in found if key[0] == row["asset"] and key[1] == -1]:
                del found[key]
            found[row["asset"], row["frame_index"]] = row["error_kind"]
    return found


def quarantined(store):
    return {(asset, index): kind for asset, index, kind, _ in History.load(store).quarantined()}


def check(store, num_frames, bad):
    """What every reader says of the job."""
    found = verify_job(store.url, StorageOptions())
    assert found.is_complete, (found.faults, found.undecided)
    assert found.orphans == []
    status = job_status(store.url, StorageOptions())
    assert status.num_frames == num_frames == status.num_ok + len(bad)
    assert status.state == ("quarantined" if bad else "done")
    assert quarantined(store) == bad
    assert {key: kind for key, kind in outcomes(store).items() if kind} == bad
    assert len(outcomes(store)) == num_frames
    assert len(JobDataset(store.url)) == status.num_ok


BAD = {("cut.jpg", 0): "truncated", ("empty.mp4", -1): "truncated", ("text.png", -1): "corrupt"}


@ANYWHERE
def test_a_retry_does_exactly_the_frames_of_a_kind(call, job, archive):
    check(job, 19, BAD)
    before = objects(job)
    (archive / "text.png").write_bytes(encode_image(picture(*SIZE, 8), "PNG"))
    (archive / "cut.jpg").write_bytes(still(7))
    code, result = call("retry", job.url, "--only", "corrupt", "--json")
    assert (code, result["outcome"], result["num_computed"]) == (3, "quarantined", 1)
    assert objects(job) == before
    (_, first), (_, second) = read_plans(job)
    assert (first.reason, second.reason, second.only) == ("first", "retry", ("corrupt",))
    assert second.num_frames == 1
    check(job, 19, {key: kind for key, kind in BAD.items() if kind != "corrupt"})
    assert job.exists("png/text.png_depth.png")
    assert not job.exists("png/cut.jpg_depth.png")
    retried = f"{second.num_frames} of {len(BAD)} frames"
    print(f"PROOF retry of a kind {where(job.url)}: {retried}, older objects as before")


@pytest.fixture
def tar_job(call, tmp_path):
    """A finished job over a tar that is cut in its fourth member; its second is no image."""
    members = [(f"{index}.jpg", still(index)) for index in range(5)]
    whole = tar_of(members)
    members[1] = ("1.jpg", b"no image" * 40)
    damaged = tar_of(members)
    folder = tmp_path / "tars"
    folder.mkdir()
    (folder / "day.tar").write_bytes(damaged[: damaged.index(b"3.jpg") + 700])
    (folder / "plain.jpg").write_bytes(still(9))
    code, result = annotate(call, folder, tmp_path / "tar-job")
    assert (code, result["num_frames"], result["num_quarantined"]) == (3, 5, 2)
    return open_store(str(tmp_path / "tar-job")), folder / "day.tar", whole


BAD_MEMBER, BAD_TAR = {("day.tar/1.jpg", -1): "corrupt"}, {("day.tar", -1): "truncated"}


def test_members_of_a_tar_are_tried_again(call, tar_job):
    store, path, whole = tar_job
    check(store, 5, BAD_MEMBER | BAD_TAR)
    assert store.exists("png/day.tar/0.jpg_depth.png")
    before = objects(store)
    call("retry", store.url, "--json")
    check(store, 5, BAD_MEMBER | BAD_TAR)
    path.write_bytes(whole)
    code, result = call("retry", store.url, "--only", "corrupt", "--json")
    assert (code, result["num_computed"], result["num_quarantined"]) == (3, 1, 1)
    check(store, 5, BAD_TAR)
    # The members behind the damage are new; what was annotated before is left alone.
    code, result = call("retry", store.url, "--json")
    assert (code, result["num_frames"], result["num_quarantined"]) == (0, 6, 0)
    check(store, 6, {})
    assert objects(store) == before
    plans = [plan for _, plan in read_plans(store)]
    assert [plan.num_frames for plan in plans] == [5, 2, 1, 2]
    assert [plan.reopened for plan in plans] == [(), ("day.tar",), (), ("day.tar",)]


def test_a_tar_that_ends_well_after_all_has_nothing_new(call, tar_job):
    store, path, _ = tar_job
    path.write_bytes(tar_of([("0.jpg", still(0)), ("2.jpg", still(2))]))
    code, result = call("retry", store.url, "--only", "truncated", "--json")
    assert (code, result["num_frames"], result["num_quarantined"]) == (3, 4, 1)
    check(store, 4, BAD_MEMBER)
    call("retry", store.url, "--json")
    check(store, 4, dict.fromkeys(BAD_MEMBER, "not_found"))


def test_a_tar_that_is_gone(call, tar_job):
    store, path, _ = tar_job
    path.unlink()
    call("retry", store.url, "--json")
    check(store, 5, dict.fromkeys(BAD_MEMBER | BAD_TAR, "not_found"))


def test_a_shard_of_members_is_repaired(call, tar_job):
    store, _, _ = tar_job
    record = json.loads(store.read("gen-0000/commit/00000/shard-00000000.json"))
    key = f"gen-0000/{record['files'][0]['path']}"
    store.put(key, store.read(key)[:-1])
    assert call("verify", store.url, "--repair", "--json")[0] == 0
    assert verify_job(store.url, StorageOptions()).is_complete
    assert quarantined(store) == BAD_MEMBER | BAD_TAR
    assert job_status(store.url, StorageOptions()).num_frames == 5


def test_what_could_not_be_opened_gives_all_its_frames(call, job, archive):
    write_video(archive / "empty.mp4", num_frames=7, size=SIZE, gop=3)
    (archive / "cut.jpg").write_bytes(still(7))
    code, result = call("retry", job.url, "--json")
    assert (code, result["num_frames"], result["num_quarantined"]) == (3, 25, 1)
    check(job, 25, {("text.png", -1): "corrupt"})
    (archive / "text.png").write_bytes(encode_image(picture(*SIZE, 8), "PNG"))
    code, result = call("retry", job.url, "--json")
    assert (code, result["num_frames"], result["num_quarantined"]) == (0, 25, 0)
    check(job, 25, {})
    assert [plan.num_frames for _, plan in read_plans(job)] == [19, 9, 1]


def test_what_has_gone_keeps_its_frames_with_another_kind(call, job, archive):
    for name in ("cut.jpg", "empty.mp4"):
        (archive / name).unlink()
    code, _ = call("retry", job.url, "--json")
    assert code == 3
    gone = {("cut.jpg", 0): "not_found", ("empty.mp4", -1): "not_found"}
    check(job, 19, gone | {("text.png", -1): "corrupt"})


def test_frames_that_a_video_promised_come_in_a_retry(call, tmp_path, archive, job):
    whole = (archive / "drive.mp4").read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    (other / "drive.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (other / "0.jpg").write_bytes(still(0))
    arguments = ["--input", other, "--output", tmp_path / "again", "--json"]
    arguments += ["--weights", tmp_path / "weights.safetensors"]
    code, _ = call("run", *arguments, "--set", "geometry.short_side_px=64")
    store = open_store(str(tmp_path / "again"))
    lost = quarantined(store)
    assert code == 3
    assert lost
    (other / "drive.mp4").write_bytes(whole)
    code, again = call("retry", store.url, "--json")
    assert code == 0
    assert again["num_frames"] == 11
    check(store, 11, {})


def unfinish(store):
    """As if the first shard had never been decided."""
    store.delete([FIRST.success_key, FIRST.commit_key(0)])
    store.delete([item.key for item in store.list("manifest/")])


def test_nothing_to_try_again_changes_nothing(call, job):
    code, err = call("retry", job.url, "--only", "timeout")
    assert code == 3
    assert "no frame is quarantined with timeout" in err
    assert len(read_plans(job)) == 1


def test_a_user_s_mistakes(call, job):
    code, err = call("retry", job.url, "--only", "sadness")
    assert code == 2
    assert "no such kind; there are fetch, not_found" in err
    unfinish(job)
    code, err = call("retry", job.url)
    assert code == 2
    assert "finish it first" in err


def test_a_retry_that_was_stopped_is_resumed(call, job, archive, monkeypatch):
    (archive / "cut.jpg").write_bytes(still(7))
    (archive / "text.png").write_bytes(encode_image(picture(*SIZE, 8), "PNG"))
    with monkeypatch.context() as patch:

        def fail(*_):
            raise KeyboardInterrupt

        patch.setattr("pipeline.graph.run_graph", fail)
        assert call("retry", job.url)[0] == 130
    assert len(read_plans(job)) == 2
    status = job_status(job.url, StorageOptions())
    assert (status.state, status.num_frames, status.num_quarantined) == ("interrupted", 19, 3)
    assert call("retry", job.url)[0] == 2
    assert resume_job(job.url, StorageOptions()).num_quarantined == 1
    check(job, 19, {("empty.mp4", -1): "truncated"})


def test_a_run_with_the_same_settings_goes_on_with_the_newest(call, job, archive, tmp_path):
    (archive / "cut.jpg").write_bytes(still(7))
    call("retry", job.url, "--only", "truncated")
    arguments = ["run", "--input", archive, "--output", job.url, "--json"]
    arguments += ["--weights", tmp_path / "weights.safetensors"]
    for setting in ("geometry.short_side_px=64", "shard.frames=4", "output.png=true"):
        arguments += ["--set", setting]
    code, result = call(*arguments)
    assert (code, result["num_computed"], result["num_quarantined"]) == (3, 0, 2)


def damage_data(store):
    key = next(item.key for item in store.list(FIRST.data_prefix))
    data = bytearray(store.read(key))
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data))


def lose_data(store):
    store.delete([next(item.key for item in store.list(FIRST.data_prefix))])


def damage_record(store):
    store.put(FIRST.commit_key(1), store.read(FIRST.commit_key(1))[:-9])


def lie_in_record(store):
    fields = json.loads(store.read(FIRST.commit_key(1)))
    store.put(FIRST.commit_key(1), json.dumps({**fields, "num_ok": 1}).encode())


def lose_record(store):
    store.delete([FIRST.commit_key(2)])


@pytest.mark.parametrize(
    ("job_url", "damage"),
    [
        *(("local", damage) for damage in (damage_data, lose_data, damage_record)),
        *(("local", damage) for damage in (lie_in_record, lose_record)),
        *(("S3", damage) for damage in (damage_data, lose_record)),
    ],
    indirect=["job_url"],
)
def test_a_repair_does_exactly_what_is_broken(call, job, damage):
    kept = outcomes(job)
    damage(job)
    before = objects(job)
    found = verify_job(job.url, StorageOptions())
    assert len(found.broken) == 1
    code, said = call("verify", job.url, "--repair", "--json")
    assert (code, said["complete"], said["replaced"]) == (0, True, 1)
    assert objects(job) == before
    (_, first), (_, second) = read_plans(job)
    assert (second.reason, set(second.replaced)) == ("repair", found.broken)
    shards = {shard.shard_id: shard for part in first.parts for shard in read_part(job, part)}
    ((_, broken),) = found.broken
    assert second.num_frames == shards[broken].num_frames < first.num_frames
    status = job_status(job.url, StorageOptions())
    assert (status.num_frames, status.state) == (19, "quarantined")
    assert quarantined(job) == {key: kind for key, kind in kept.items() if kind} == BAD
    assert len(JobDataset(job.url)) == 16
    print(f"PROOF repair {where(job.url)}, {damage.__name__}: 1 shard, older objects as before")


def test_a_repair_of_a_repaired_and_retried_job(call, job, archive):
    (archive / "text.png").write_bytes(encode_image(picture(*SIZE, 8), "PNG"))
    call("retry", job.url)
    key = next(item.key for item in job.list(SECOND.data_prefix))
    job.delete([key])
    damage_data(job)
    code, said = call("verify", job.url, "--repair", "--json")
    assert (code, said["replaced"]) == (0, 2)
    status = job_status(job.url, StorageOptions())
    assert (status.num_frames, status.num_ok, status.num_generations) == (19, 17, 3)
    lose_record(job)
    job.delete([next(item.key for item in job.list(THIRD.data_prefix))])
    code, _ = call("verify", job.url, "--repair", "--json")
    assert code == 0
    status = job_status(job.url, StorageOptions())
    assert (status.num_frames, status.num_ok, status.num_generations) == (19, 17, 4)
    assert len(JobDataset(job.url)) == 17


def test_a_repair_of_an_unfinished_job_finishes_it(call, job):
    damage_record(job)
    unfinish(job)
    code, _ = call("resume", job.url)
    assert code == 1
    code, said = call("verify", job.url, "--repair", "--json")
    assert (code, said["complete"]) == (0, True)
    assert job_status(job.url, StorageOptions()).num_frames == 19


def test_nothing_broken_nothing_done(call, job):
    before = {item.key for item in job.list("")}
    code, said = call("verify", job.url, "--repair", "--json")
    assert (code, said["sound"]) == (0, True)
    assert {item.key for item in job.list("")} == before


def lose_pngs(store):
    """As if the driver had been killed after its last commit, before it made any PNG."""
    keys = [FIRST.success_key]
    keys += [item.key for prefix in (FIRST.png_done_prefix, "png/") for item in store.list(prefix)]
    store.delete(keys)


@ANYWHERE
def test_pngs_that_show_other_things_than_the_data_are_made_anew(call, job, archive):
    keys = ["png/0.jpg_depth.png", "png/3.jpg_color.png"]
    wanted = [job.read(key) for key in keys]
    job.put(keys[0], job.read("png/1.jpg_depth.png"))
    job.put(keys[1], wanted[1][:100])
    job.delete(["png/4.jpg_labelTrainIds.png"])
    # Nothing but their data is needed for it.
    (archive / "0.jpg").unlink()
    code, said = call("verify", job.url, "--json")
    assert (code, said["sound"], said["broken"], len(said["faults"])) == (1, False, [], 3)
    assert all(key in said["bad_pngs"] for key in keys)
    others = {item.key: job.read(item.key) for item in job.list("") if item.key not in keys}
    code, said = call("verify", job.url, "--repair", "--json")
    assert (code, said["complete"], said["replaced"]) == (0, True, 0)
    assert [job.read(key) for key in keys] == wanted
    assert all(job.read(key) == data for key, data in others.items())
    assert job.exists("png/4.jpg_labelTrainIds.png")


def test_pngs_follow_the_newest_generation(call, job, archive):
    """What an older one said of the same frame does not count, and is no fault."""
    (archive / "text.png").write_bytes(encode_image(picture(*SIZE, 8), "PNG"))
    call("retry", job.url)
    assert verify_job(job.url, StorageOptions()).is_complete
    job.put("png/text.png_depth.png", job.read("png/1.jpg_depth.png"))
    code, said = call("verify", job.url, "--json")
    assert (code, said["bad_pngs"]) == (1, {"png/text.png_depth.png": [1, 1]})
    assert said["faults"] == [
        "png/text.png_depth.png: missing, or not what the data of shard 1 shows"
    ]


def test_a_frame_that_a_repair_finds_gone_has_no_pngs_any_more(call, job, archive):
    before = {item.key for item in job.list("png/")}
    for path in ("0.jpg", "drive.mp4"):
        (archive / path).unlink()
    job.delete([item.key for item in job.list(FIRST.data_prefix)])
    code, said = call("verify", job.url, "--repair", "--json")
    assert (code, said["complete"]) == (0, True)
    after = {item.key for item in job.list("png/")}
    gone = {key for key in before if key.startswith(("png/0.jpg_", "png/drive.mp4/"))}
    assert len(gone) == 33
    assert after == before - gone
    stale = "png/drive.mp4/000004_color.png"
    job.put(stale, job.read("png/1.jpg_color.png"))
    code, said = call("verify", job.url, "--json")
    assert (code, list(said["bad_pngs"])) == (1, [stale])
    code, said = call("verify", job.url, "--repair", "--json")
    assert (code, said["complete"], len(read_plans(job))) == (0, True, 2)
    assert {item.key for item in job.list("png/")} == after


COLOR = "png/cut.jpg_color.png"


@pytest.fixture
def retried(call, job, archive):
    """A job whose second generation says that a frame is an error, its third that it is not."""
    call("retry", job.url, "--only", "truncated")
    (archive / "cut.jpg").write_bytes(still(7))
    call("retry", job.url, "--only", "truncated")
    assert [plan.num_frames for _, plan in read_plans(job)] == [19, 2, 2]
    assert verify_job(job.url, StorageOptions()).is_complete
    return job


def test_an_older_generation_deletes_no_png_of_a_newer(call, retried):
    """Neither a driver that misses its markers nor a publisher that slept for long."""
    assert retried.exists(COLOR)
    for item in list(retried.list(SECOND.png_done_prefix)):
        retried.delete([item.key])
    assert call("resume", retried.url)[0] == 3
    for item in list(retried.list(SECOND.data_prefix)):
        make_pngs(retried, SECOND, attempt_of(item.key)[0], retried.read(item.key))
    assert retried.exists(COLOR)
    assert verify_job(retried.url, StorageOptions()).is_complete


def test_pngs_of_a_retry_that_came_meanwhile_are_its_own_business(call, job, archive, monkeypatch):
    call("retry", job.url, "--only", "truncated")
    (archive / "cut.jpg").write_bytes(still(7))
    check = _Generation.check

    def retry_first(self, progress):
        if len(read_plans(job)) == 2:
            retry.retry_job(job.url, StorageOptions(), only=["truncated"])
        check(self, progress)

    monkeypatch.setattr(_Generation, "check", retry_first)
    assert verify_job(job.url, StorageOptions()).faults == []
    assert len(read_plans(job)) == 3
    assert job.exists(COLOR)


def test_pngs_that_a_newer_generation_has_yet_to_make_are_no_fault(call, job, archive, monkeypatch):
    call("retry", job.url, "--only", "truncated")
    with monkeypatch.context() as patch:

        def fail(*_):
            raise KeyboardInterrupt

        patch.setattr("pipeline.graph.run_graph", fail)
        assert call("retry", job.url, "--only", "truncated")[0] == 130
    job.put(COLOR, job.read("png/1.jpg_color.png"))
    found = verify_job(job.url, StorageOptions())
    assert (found.faults, list(found.undecided)) == ([], [2])


def test_a_repair_deletes_what_an_older_generation_left(call, job, archive):
    (archive / "0.jpg").unlink()
    job.delete([item.key for item in job.list(FIRST.data_prefix)])
    assert call("verify", job.url, "--repair")[0] == 0
    assert call("retry", job.url, "--only", "truncated")[0] == 3
    stale = "png/0.jpg_color.png"
    job.put(stale, job.read("png/1.jpg_color.png"))
    assert list(verify_job(job.url, StorageOptions()).bad_pngs) == [stale]
    assert call("verify", job.url, "--repair")[0] == 0
    assert not job.exists(stale)


def test_a_retry_leaves_no_pngs_behind(call, job):
    lose_pngs(job)
    code, err = call("retry", job.url)
    assert code == 2
    assert "finish it first" in err
    assert call("resume", job.url)[0] == 3
    assert call("retry", job.url)[0] == 3
    assert job.exists("png/0.jpg_depth.png")


def test_a_repair_leaves_no_pngs_behind(call, job):
    lose_pngs(job)
    damage_record(job)
    job.delete([item.key for item in job.list("manifest/")])
    code, said = call("verify", job.url, "--repair", "--json")
    assert (code, said["replaced"]) == (0, 1)
    assert all(job.exists(f"png/{index}.jpg_depth.png") for index in range(6))
    job.delete([next(item.key for item in job.list(FIRST.png_done_prefix))])
    found = verify_job(job.url, StorageOptions())
    assert "finished without the marker of its PNGs" in found.text()
    assert call("resume", job.url)[0] == 3
    assert verify_job(job.url, StorageOptions()).is_complete


def test_a_record_lost_in_an_older_generation_is_found_and_done_anew(call, job):
    call("retry", job.url)
    lose_record(job)
    job.delete([item.key for item in job.list("manifest/") if "snapshot-0000" in item.key])
    code, err = call("resume", job.url)
    assert code == 1
    assert "1 shards of older generations" in err
    assert job_status(job.url, StorageOptions()).state == "interrupted"
    code, said = call("verify", job.url, "--repair", "--json")
    assert (code, said["replaced"]) == (0, 1)
    assert job_status(job.url, StorageOptions()).num_frames == 19


def test_a_generation_whose_plan_was_lost_is_no_secret(call, job):
    call("retry", job.url)
    job.delete([SECOND.plan_key])
    (fault,) = verify_job(job.url, StorageOptions()).faults
    assert fault == f"{SECOND.plan_key}: missing, though records were committed for it"


@pytest.mark.parametrize(
    "data", [b'"text"', b"null", b"[]", b"[" * 100_000, b'{"parts":[],"replaced":[[1e999,0]]}']
)
def test_a_malformed_plan_is_a_clear_end(call, job, data):
    call("retry", job.url)
    job.put(SECOND.plan_key, data)
    for verb in ("resume", "retry", "verify", "status"):
        code, err = call(verb, job.url)
        assert code == 1
        assert "plan.json is malformed" in err


def test_a_plan_with_another_field_is_a_clear_end(call, job):
    plan = job.read(FIRST.plan_key)
    for field, value in (
        *(("num_shards", value) for value in (10**14, "4", 4.0, None, 3)),
        *(("plan_id", value) for value in (5, None, {})),
        *(("first_shard", value) for value in (None, "0", 1, -1)),
        *(("key", value) for value in (None, 5, "s3://a:b@c/d", "gen-0000/plan/../../job.json")),
        ("something", "new"),
    ):
        fields = json.loads(plan)
        of_part = field in fields["parts"][0] and field != "num_shards"
        (fields["parts"][0] if of_part else fields)[field] = value
        job.put(FIRST.plan_key, json.dumps(fields).encode())
        for verb in ("verify", "status"):
            code, err = call(verb, job.url)
            assert code == 1
            assert "plan.json is malformed: " in err


@pytest.mark.parametrize("replaced", [[-1, 0], [-2, 0], [1, 0], [0, -1], [0, 99], [0, 10**30]])
def test_a_plan_can_only_replace_what_is_there(call, job, replaced):
    fields = json.loads(job.read(FIRST.plan_key))
    job.put(SECOND.plan_key, json.dumps({**fields, "replaced": [replaced]}).encode())
    for verb in ("verify", "status"):
        code, err = call(verb, job.url)
        assert code == 1
        assert "no earlier plan" in err


def test_a_repair_that_was_killed_says_what_goes_on_with_it(call, job, monkeypatch):
    damage_data(job)
    with monkeypatch.context() as patch:

        def fail(*_):
            raise KeyboardInterrupt

        patch.setattr("pipeline.graph.run_graph", fail)
        assert call("verify", job.url, "--repair")[0] == 130
    code, err = call("verify", job.url, "--repair")
    assert code == 1
    assert "go on with `segformer3d resume`" in err
    assert call("resume", job.url)[0] == 3
    assert verify_job(job.url, StorageOptions()).is_complete


def test_frames_sampled_by_time_come_in_a_retry(call, tmp_path, archive, monkeypatch):
    for path in archive.iterdir():
        if path.name != "drive.mp4":
            path.unlink()

    def cut(*arguments):
        (probe,) = probe_assets(*arguments)
        return [replace(probe, pts=probe.pts[:4], num_missing=6, missing_error="cut off")]

    arguments = ["--input", archive, "--output", tmp_path / "sampled", "--json"]
    arguments += ["--weights", tmp_path / "weights.safetensors"]
    for setting in ("geometry.short_side_px=64", "sampling.frames_per_second=20"):
        arguments += ["--set", setting]
    with monkeypatch.context() as patch:
        patch.setattr("jobs.planner.probe_assets", cut)
        assert call("run", *arguments)[0] == 3
    store = open_store(str(tmp_path / "sampled"))
    num_frames = len(outcomes(store))
    assert {kind for kind in outcomes(store).values() if kind} == {"count_mismatch"}
    assert call("retry", store.url)[0] == 0, outcomes(store)
    check(store, num_frames, {})


def test_a_retry_that_comes_second_says_whose_plan_it_did(call, job, archive, monkeypatch):
    (archive / "text.png").write_bytes(encode_image(picture(*SIZE, 8), "PNG"))
    planner = retry.Replanner

    def second(spec, wanted, **options):
        monkeypatch.setattr(retry, "Replanner", planner)
        retry.retry_job(job.url, StorageOptions(), only=["corrupt"])
        return planner(spec, wanted, **options)

    monkeypatch.setattr(retry, "Replanner", second)
    code, err = call("retry", job.url, "--only", "truncated")
    assert code == 3
    assert "faster with a retry with corrupt" in err
    check(job, 19, {key: kind for key, kind in BAD.items() if kind != "corrupt"})
    assert call("retry", job.url, "--only", "truncated")[0] == 3
    assert [plan.only for _, plan in read_plans(job)] == [(), ("corrupt",), ("truncated",)]


def test_a_repair_that_comes_second_does_nothing_twice(call, job, monkeypatch):
    damage_data(job)
    faster = []

    def verify(*arguments):
        found = verify_job(*arguments)
        if not faster:
            faster.append(True)
            with monkeypatch.context() as patch:
                patch.setattr("pipeline.graph.run_graph", stop)
                with pytest.raises(KeyboardInterrupt):
                    repair.repair_job(*arguments)
        return found

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(repair, "verify_job", verify)
    code, err = call("verify", job.url, "--repair")
    assert len(read_plans(job)) == 2, "the frames are planned twice"
    assert code == 1
    assert "go on with `segformer3d resume`" in err
    assert call("resume", job.url)[0] == 3
    assert job_status(job.url, StorageOptions()).num_ok == 16


def test_a_repair_drops_a_damaged_snapshot(call, job):
    key = max(item.key for item in job.list("manifest/"))
    job.put(key, job.read(key)[:-1])
    assert not verify_job(job.url, StorageOptions()).is_sound
    code, said = call("verify", job.url, "--repair", "--json")
    assert (code, said["complete"]) == (0, True)
    assert not job.exists(key)
    assert len(read_plans(job)) == 1


def test_a_repair_does_nothing_while_an_object_cannot_be_read(call, job, monkeypatch):
    damage_data(job)
    read = LocalStore.read

    def fail(self, key):
        if key == FIRST.commit_key(1):
            raise StoreUnavailableError(f"{key}: slow down")
        return read(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "read", fail)
        code, err = call("verify", job.url, "--repair")
    assert code == 1
    assert "nothing was done" in err
    assert "shard-00000001.json: slow down" in err
    assert len(read_plans(job)) == 1
    assert call("verify", job.url, "--repair")[0] == 0
    assert len(read_plans(job)[1][1].replaced) == 1


def test_losers_of_an_older_generation_are_collected(call, job):
    call("retry", job.url)
    losers = [FIRST.data_key(0, "c" * 32), FIRST.plan_part_key("d" * 32, 0)]
    for key in losers:
        job.put(key, b"lost")
    assert verify_job(job.url, StorageOptions()).orphans == losers
    call("resume", job.url)
    assert verify_job(job.url, StorageOptions()).orphans == []


def test_a_repair_waits_for_the_driver_at_work(call, job):
    damage_data(job)
    beat(job, Heartbeat.now(take_lease(job), "running"))
    code, err = call("verify", job.url, "--repair")
    assert code == 2
    assert "works on this job" in err
    assert len(read_plans(job)) == 1


def test_a_repair_of_pngs_waits_for_him_too(call, job):
    job.put("png/0.jpg_color.png", b"x")
    beat(job, Heartbeat.now(take_lease(job), "running"))
    assert call("verify", job.url, "--repair")[0] == 2
    assert job.read("png/0.jpg_color.png") == b"x"
