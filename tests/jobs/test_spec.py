"""Job files: strict, hashed where they decide the outputs, and every mistake is one line."""

import json

import pytest
import yaml

from jobs.schema import schema_path, schema_text
from jobs.spec import JobSpec, check_spec, load_ray_section, load_spec
from pipeline.errors import UserError
from pipeline.geometry import MAX_PIXELS
from pipeline.sources.assets import DecodeLimits

MINIMAL = {"input": {"url": "/archive"}, "output": {"url": "/job"}}


def spec(**sections):
    return check_spec({**MINIMAL, **sections}, "the job")


def test_defaults_need_only_input_and_output():
    job = spec()
    assert job.geometry.short_side_px is None
    assert job.sampling.every_nth == 1
    assert job.output.class_ids_size == "input"


@pytest.mark.parametrize(
    ("asked", "trained_px", "side"),
    [(None, 352, 352), (None, 375, 384), (None, None, 512), (64, 352, 64), (None, 10**9, 4096)],
)
def test_frames_have_the_size_that_weights_were_trained_at(asked, trained_px, side):
    job = spec(geometry={"short_side_px": asked}).sized_for(trained_px)
    assert job.geometry.geometry().short_side_px == side
    assert job.identity()["geometry.short_side_px"] == side


def test_a_job_file_without_end(tmp_path):
    with pytest.raises(UserError, match="/dev/zero: over 1 MiB, which no job file is"):
        load_spec("/dev/zero", [], {})


def test_yaml_with_overrides_and_flags(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, "shard": {"frames": 8}}))
    job = load_spec(
        str(path), ["shard.frames=9", "output.png=true"], {"input.url": "s3://b/x/", "a": None}
    )
    assert (job.shard.frames, job.output.png, job.input.url) == (9, True, "s3://b/x")


def test_no_file_at_all():
    job = load_spec(None, [], {"input.url": "/a", "output.url": "/b", "model.weights": None})
    assert (job.input.url, job.output.url, job.model.weights) == ("/a", "/b", None)


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = load_spec(None, [], {"input.url": "a/../x", "output.url": "out", "model.weights": "w.st"})
    assert job.input.url == str(tmp_path / "x")
    assert job.output.url == str(tmp_path / "out")
    assert job.model.weights == str(tmp_path / "w.st")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"input": {"url": "/a"}}, r"missing key output \(or --output\)"),
        ({**MINIMAL, "speed": 3}, "unknown key speed"),
        ({**MINIMAL, "shard": {"frame": 3}}, r"unknown key shard\.frame"),
        ({**MINIMAL, "shard": {"frames": 0}}, r"shard\.frames: .*greater.*got 0"),
        ({**MINIMAL, "geometry": {"mode": "crop"}}, r"geometry\.mode: .*keep_aspect.*got 'crop'"),
        ({**MINIMAL, "geometry": {"short_side_px": 500}}, "multiple of 32"),
        (
            {**MINIMAL, "sampling": {"every_nth": 2, "frames_per_second": 1.0}},
            "exclude each other",
        ),
        ({**MINIMAL, "sampling": {"frames_per_second": float("inf")}}, "frames_per_second"),
        ({**MINIMAL, "limits": {"deadline_s": 1e12}}, "deadline_s"),
        ({**MINIMAL, "limits": {"max_pixels": 10**23}}, "max_pixels"),
        ({**MINIMAL, "shard": {"frames": True}}, r"shard\.frames: .*got True"),
        ({**MINIMAL, "limits": {"deadline_s": True}}, r"deadline_s: .*got True"),
        ({**MINIMAL, "limits": {"deadline_s": 1e-9}}, r"deadline_s: .*0\.1"),
        ({**MINIMAL, "sampling": {"frames_per_second": "2"}}, r"frames_per_second: .*got '2'"),
        ({**MINIMAL, "input": "/a"}, "input: "),
        ([], "the job: "),
        ({"input": {"url": ""}, "output": {"url": "/b"}}, r"input\.url"),
    ],
)
def test_mistakes_are_named(fields, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        check_spec(fields, "the job")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "overrides", "complaint"),
    [
        ("input: [", [], "not YAML"),
        ("- a", [], "a job is a mapping"),
        ("input: {url: a}\ninput: {url: b}", [], "'input' stands twice"),
        ("shard: {frames: 2001-99-99}", [], "not YAML"),
        ("[" * 3000, [], "not YAML"),
        ("a: !!python/object/apply:os.getcwd []", [], "not YAML"),
        ("{}", ["shard.frames"], "write --set section.key=value"),
        ("shard: 3", ["shard.frames=3"], "shard is not a section"),
        ("{}", ["shard.frames=["], "not YAML"),
        ("{}", ["shard.frames=!!int 3"], "no tags like"),
        ("shard: !!map {frames: 3}", [], "no tags like"),
        ("shard: {frames: 010}", [], "the number 010 means another one"),
        ("shard: {frames: 1:30}", [], "the number 1:30 means another one"),
        ("limits: {deadline_s: 1:30.5}", [], "the number 1:30.5 means another one"),
        ("shard: {frames: " + "9" * 5000 + "}", [], "a number of 5000 characters"),
        ("{}", [".=1"], "write --set section.key=value"),
        ("{}", ["shard.frames" + "x" * 5000], "write --set section.key=value"),
    ],
)
def test_mistakes_around_the_file(tmp_path, text, overrides, complaint):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as caught:
        load_spec(str(path), overrides, {})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("input: {url: /a}\noutput: {url: /b}\nlimits: {deadline_s: 2}\n")
    job = load_spec(str(path), ["sampling.frames_per_second=0.5", "shard.frames=1_0"], {})
    assert (job.limits.deadline_s, job.sampling.frames_per_second) == (2.0, 0.5)
    assert job.shard.frames == 10


def test_a_missing_or_binary_file(tmp_path):
    with pytest.raises(UserError, match="no such job file"):
        load_spec(str(tmp_path / "none.yaml"), [], {})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_spec(str(tmp_path / "binary"), [], {})
    with pytest.raises(UserError, match="cannot be read"):
        load_spec("a\0b", [], {})


def test_one_place_has_one_name(tmp_path):
    fields = {"input": {"url": f"file://{tmp_path}/a%20b/"}, "output": {"url": "s3://"}}
    job = check_spec(fields, "the job")
    assert job.input.url == f"{tmp_path}/a b"
    assert job.output.url == "s3://"
    with pytest.raises(UserError, match="no such user"):
        check_spec({"input": {"url": "~nobody-here/x"}, "output": {"url": "/b"}}, "the job")


def test_a_bomb_of_aliases_stays_short():
    bomb = ["x"] * 9
    for _ in range(6):
        bomb = [bomb] * 9
    with pytest.raises(UserError) as caught:
        check_spec({"input": {"url": bomb}, "output": {"url": "/b"}}, "the job")
    assert len(str(caught.value)) < 500


def test_the_decoder_has_the_bounds_that_are_asked_for():
    bounds = {"max_pixels": 7, "max_file_bytes": 8, "deadline_s": 9.0, "memory_bytes": 2**28 + 1}
    assert spec(limits=bounds).limits.limits() == DecodeLimits(**bounds)
    assert spec(limits={"max_pixels": 2**31}).limits.limits().max_pixels == MAX_PIXELS


def test_identity_holds_what_decides_the_outputs():
    base = spec().identity()
    assert spec(ray={"max_actors": 3}, model={"micro_batch": 2}).identity() == base
    for section in (
        {"sampling": {"every_nth": 2}},
        {"geometry": {"short_side_px": 256}},
        {"shard": {"frames": 8}},
        {"limits": {"deadline_s": 5}},
        {"output": {"url": "/job", "png": True}},
        {"input": {"url": "/archive", "exclude": ["*.png"]}},
    ):
        assert spec(**section).identity() != base


def test_only_ray_settings_of_an_existing_job_change():
    assert load_ray_section(["ray.max_actors=2"]).max_actors == 2
    with pytest.raises(UserError, match=r"only ray\.KEY"):
        load_ray_section(["shard.frames=2"])
    with pytest.raises(UserError, match="max_actors"):
        load_ray_section(["ray.max_actors=-1"])


def test_the_shipped_schema_is_current():
    assert schema_path().read_text() == schema_text(), "run `make schema`"
    assert json.loads(schema_text())["additionalProperties"] is False


def test_specs_survive_their_own_dump():
    job = spec(sampling={"frames_per_second": 2.0})
    assert JobSpec.model_validate(job.model_dump(mode="json")) == job


def test_the_shipped_templates_are_valid():
    templates = sorted(schema_path().parent.glob("*.yaml"))
    assert templates
    for template in templates:
        load_spec(str(template), [], {})
