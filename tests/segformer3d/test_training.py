"""The training loop: exact resumption, frozen parts, ranks, best weights, what is refused."""

import itertools
import math

import pytest
import torch

from segformer3d import validation as validation_module
from segformer3d.checkpoint import read_checkpoint
from segformer3d.config import METRIC_DEPTH, ModelConfig, WeightsInfo
from segformer3d.model import build_model
from segformer3d.recipe import RecipeError
from segformer3d.start import starting_model
from segformer3d.training import DivergedError, Trainer
from segformer3d.training_log import TrainingLog
from segformer3d.weights import load_weights, save_weights
from segformer3d.weights_file import read_info
from tests.segformer3d.training_parts import (
    SIDE,
    TINY,
    Numbered,
    make_recipe,
    open_numbered,
    spawn_ranks,
    train_and_tell,
)

EVERYTHING = {
    "data": [{"dataset": "tiny:5", "share": 2}, {"dataset": "coarse:4"}, {"dataset": "depth:3"}],
    "augmentation": {"scale": [0.7, 1.4], "flip": 0.5, "colour": 0.5},
    "phases": [{"steps": 6, "crop_px": [SIDE, SIDE], "batch": 4}],
    "loss": {"overlap": 0.5, "depth_kind": "inverse_huber", "weighting": "uncertainty"},
    "optimizer": {"rate": 1e-3, "layer_decay": 0.8},
    "schedule": {"kind": "poly", "warm_up_steps": 2},
    "ema_decay": 0.9,
    "clip_norm": 1.0,
}


def trainer_of(folder, open_source=open_numbered, **fields):
    return Trainer(make_recipe(**fields), folder, device="cpu", open_source=open_source)


def bits(folder, name="last.safetensors"):
    return (folder / name).read_bytes()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_training_that_goes_on_ends_with_the_same_bits(tmp_path, precision):
    fields = {**EVERYTHING, "precision": precision}
    trainer_of(tmp_path / "unbroken", **fields).run()
    broken = tmp_path / "broken"
    for _ in range(3):
        outcome = trainer_of(broken, **fields).run(max_steps=2)
    assert outcome.is_complete
    assert bits(broken) == bits(tmp_path / "unbroken")
    one, two = (torch.load(f / "checkpoint.pt") for f in (broken, tmp_path / "unbroken"))
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    assert all(p.dtype != torch.bfloat16 for p in one["average"].values())
    assert one["objective"] == two["objective"]
    assert all(value != 0 for value in one["objective"].values())


def test_a_training_with_a_teacher_goes_on_with_the_same_bits(tmp_path):
    config = ModelConfig(variant=TINY, head_width=8, depth_activation="exp")
    info = WeightsInfo(config=config, depth_codec=METRIC_DEPTH, training_data="tests")
    save_weights(tmp_path / "teacher.safetensors", build_model(config), info)
    fields = {
        "data": [{"dataset": "tiny:6", "share": 2}, {"dataset": "coarse:5", "distil": True}],
        "teacher": {
            "weights": str(tmp_path / "teacher.safetensors"),
            "depth": 0.5,
            "features": 1.0,
        },
    }
    trainer = trainer_of(tmp_path / "unbroken", **fields)
    before = [value.clone() for value in trainer.objective.lessons.parameters()]
    trainer.run()
    for _ in range(2):
        trainer_of(tmp_path / "broken", **fields).run(max_steps=2)
    assert bits(tmp_path / "broken") == bits(tmp_path / "unbroken")
    lessons = trainer.objective.lessons
    taught = dict(lessons.named_parameters())
    changed = {
        name
        for (name, value), old in zip(taught.items(), before, strict=True)
        if not torch.equal(value, old)
    }
    assert changed == {name for name in taught if name.startswith("hints.")}
    state = torch.load(tmp_path / "broken" / "checkpoint.pt")
    assert set(state["objective"]) == {f"lessons.{name}" for name in changed}


def test_loader_processes_change_nothing(tmp_path):
    trainer_of(tmp_path / "none", **EVERYTHING).run(max_steps=2)
    trainer_of(tmp_path / "one", **EVERYTHING, loader_workers=1).run(max_steps=2)
    assert bits(tmp_path / "none") == bits(tmp_path / "one")


def test_frozen_parts_keep_their_bits(tmp_path):
    frozen = ("encoder", "segmentation_head")
    trainer = trainer_of(tmp_path, freeze=frozen, loss={"depth_kind": "mse"}, ema_decay=0.9)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.run()
    for model in (trainer.model, load_weights(tmp_path / "last.safetensors")):
        for name, value in model.state_dict().items():
            same = torch.equal(value, before[name])
            assert same == name.startswith(frozen), name


def test_a_batch_without_depth_leaves_the_depth_head_alone(tmp_path):
    trainer = trainer_of(tmp_path, data=[{"dataset": "coarse:4"}])
    trainer.run(max_steps=1)
    assert all((p.grad == 0).all() for p in trainer.model.depth_head.parameters())
    assert any((p.grad != 0).any() for p in trainer.model.encoder.parameters())
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_two_ranks_are_one(tmp_path):
    """With drop path, dropout and everything else that draws or looks at the whole batch."""
    recipe = make_recipe(
        **EVERYTHING,
        validation={"datasets": {"v": "tiny:3"}, "every_steps": 100, "losses": True},
    )
    train_and_tell(0, tmp_path / "one", recipe)
    spawn_ranks(train_and_tell, tmp_path / "two", recipe)
    one, two = (torch.load(tmp_path / name / "found.pt") for name in ("one", "two"))
    assert one[0].keys() == two[0].keys()
    for name, gradient in one[0].items():
        torch.testing.assert_close(two[0][name], gradient, atol=2e-5, rtol=1e-3)
    for ours, theirs in zip(one[1], two[1], strict=True):
        for name, value in ours.items():
            assert theirs[name] == pytest.approx(value, rel=0.02, abs=1e-4), name
    torch.testing.assert_close(two[2], one[2], atol=5e-3, rtol=5e-2)
    torch.testing.assert_close(two[3], one[3], atol=5e-3, rtol=5e-2)
    assert two[4]["v.loss"] == pytest.approx(one[4]["v.loss"], rel=1e-2)


class Scripted:
    """Stands in for `measure`: scores that were thought out."""

    def __init__(self, scores):
        self._scores = iter(scores)

    def __call__(self, _predictor, _source, _indices, _side, **_options):
        return self, None

    def to_dict(self):
        score = next(self._scores)
        return {"mean_iou": score, "pixel_accuracy": 1 - score, "counts": [1]}


@pytest.mark.parametrize(
    ("best", "expected"), [(["v.mean_iou"], 2), (["-v.mean_iou"], 3), (["v.pixel_accuracy"], 3)]
)
def test_the_best_weights_are_those_of_the_chosen_metric(tmp_path, monkeypatch, best, expected):
    monkeypatch.setattr(validation_module, "measure", Scripted([0.4, 0.6, 0.1, 0.5]))
    validation = {"datasets": {"v": "tiny:2"}, "every_steps": 1, "best": best}
    trainer = trainer_of(tmp_path, validation=validation)
    kept = {}
    for step in itertools.count(1):
        outcome = trainer.run(max_steps=1)
        kept[step] = load_weights(tmp_path / "last.safetensors").state_dict()
        if outcome.is_complete:
            break
    chosen = load_weights(tmp_path / "best.safetensors").state_dict()
    assert all(torch.equal(chosen[name], kept[expected][name]) for name in chosen)
    assert (
        read_info(tmp_path / "best.safetensors").quality[best[0].removeprefix("-")]
        in ({2: (0.6,), 3: (0.1, 0.9)}[expected])
    )
    assert outcome.best == pytest.approx({2: 0.6, 3: {"-": -0.1}.get(best[0][0], 0.9)}[expected])


def test_another_choice_of_the_best_starts_anew(tmp_path):
    datasets = {"datasets": {"v": "tiny:2"}, "every_steps": 1}
    trainer_of(tmp_path, validation={**datasets, "best": ["v.mean_iou"]}).run(max_steps=1)
    again = trainer_of(tmp_path, validation={**datasets, "best": ["-v.abs_rel"]})
    assert again.progress.best == -math.inf


def test_validation_measures_the_recipe_s_losses(tmp_path):
    validation = {"datasets": {"v": "tiny:3"}, "every_steps": 1, "losses": True}
    trainer = trainer_of(tmp_path, validation=validation, loss={"depth_kind": "mse", "depth": 2})
    trainer.run(max_steps=1)
    model = load_weights(tmp_path / "last.safetensors")
    squares, entropies = [], []
    for index in range(3):
        sample = Numbered(3)[index]
        x = torch.from_numpy(sample.image).permute(2, 0, 1)[None].float() / 255
        x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
            [0.229, 0.224, 0.225]
        ).view(3, 1, 1)
        with torch.no_grad():
            out = model(x).resized((SIDE, SIDE))
        squares.append((out.depth[0, 0] - torch.from_numpy(sample.depth)).square().mean())
        target = torch.from_numpy(sample.class_ids).long()[None]
        entropies.append(torch.nn.functional.cross_entropy(out.logits, target))
    metrics = trainer.metrics
    assert metrics["v.loss_depth"] == pytest.approx(sum(squares).item() / 3, rel=1e-4)
    assert metrics["v.loss_classes"] == pytest.approx(sum(entropies).item() / 3, rel=1e-4)
    expected = metrics["v.loss_classes"] + 2 * metrics["v.loss_depth"]
    assert metrics["v.loss"] == pytest.approx(expected)


def test_the_logs(tmp_path):
    fields = {
        "phases": [{"steps": 12, "crop_px": [32, 32], "batch": 2}],
        "validation": {"datasets": {"v": "tiny:1"}, "every_steps": 6},
    }
    seen, steps = [], []
    trainer_of(tmp_path, **fields).run(
        report=lambda step, values: seen.append((step, values)), on_step=steps.append
    )
    assert steps == list(range(1, 13))
    rows = TrainingLog(tmp_path, after_step=12).rows()
    assert {(s, n) for s, v in seen for n in v} == {(s, n) for s, n, _ in rows}
    assert {step for step, name, _ in rows if name == "depth"} == {10, 12}
    assert {step for step, name, _ in rows if name == "v.mean_iou"} == {6, 12}
    assert (tmp_path / "log.csv").read_text().startswith("step,name,value\n")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents*"))


def test_a_log_forgets_what_is_done_again_and_what_was_cut_short(tmp_path):
    with TrainingLog(tmp_path) as log:
        for step in (10, 20, 30):
            log.write(step, {"depth": step / 10})
    with (tmp_path / "log.csv").open("a") as file:
        file.write("40,de")
    assert TrainingLog(tmp_path, after_step=20).rows() == [(10, "depth", 1), (20, "depth", 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 5}, "another recipe .*seed"),
        ({"data": [{"dataset": "tiny:7"}]}, "another recipe .*data"),
        ({"open_source": lambda _: Numbered(7)}, "has 7 samples, but had 6"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, change, message):
    trainer_of(tmp_path).run(max_steps=1)
    with pytest.raises(RecipeError, match=message):
        trainer_of(tmp_path, **change)


def test_what_does_not_matter_may_change(tmp_path):
    trainer_of(tmp_path).run(max_steps=1)
    validation = {"datasets": {"v": "tiny:1"}, "every_steps": 1}
    again = trainer_of(tmp_path, validation=validation, checkpoint_minutes=1)
    assert again.progress.step == 1


@pytest.mark.parametrize("cut", [0, 10, 5000, -1])
def test_a_damaged_checkpoint_is_refused(tmp_path, cut):
    trainer_of(tmp_path).run(max_steps=1)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(RecipeError, match=r"checkpoint\.pt: damaged, remove it") as caught:
        trainer_of(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_version_is_refused(tmp_path):
    trainer_of(tmp_path).run(max_steps=1)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path)
    del state["model"]["depth_head.fuse.weight"]
    torch.save(state, path)
    with pytest.raises(RecipeError, match="of another version"):
        trainer_of(tmp_path)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    fields = {
        "optimizer": {"rate": 1e30},
        "schedule": {"kind": "constant"},
        "checkpoint_minutes": 1e-9,
    }
    with pytest.raises(DivergedError, match="not finite at step 1: lower optimizer") as caught:
        trainer_of(tmp_path, **fields).run()
    assert "\n" not in str(caught.value)
    recipe = make_recipe(**fields)
    state = read_checkpoint(tmp_path / "checkpoint.pt", recipe.identity(), [6], torch.device("cpu"))
    assert state["progress"]["step"] == 1
    assert not list(tmp_path.glob(".checkpoint*"))


def test_weights_are_started_from_and_not_needed_to_go_on(tmp_path):
    first = trainer_of(tmp_path / "first", model={**MODEL, "has_depth": False})
    first.run(max_steps=1)
    start = tmp_path / "first" / "last.safetensors"
    second = trainer_of(tmp_path / "second", start={"weights": str(start)})
    taken = load_weights(start).state_dict()
    state = second.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in taken.items())
    assert any(name.startswith("depth_head") for name in state)
    second.run(max_steps=1)
    start.unlink()
    again = trainer_of(tmp_path / "second", start={"weights": str(start)})
    assert again.progress.step == 1


MODEL = make_recipe().model.model_dump()


def test_epsilons_come_with_the_encoder(tmp_path):
    first = trainer_of(tmp_path)
    path = tmp_path / "hf.safetensors"
    config = {**first.info.config.to_dict(), "block_norm_eps": 1e-5}
    from dataclasses import replace

    from segformer3d.config import ModelConfig
    from segformer3d.model import build_model

    model = build_model(ModelConfig(**config))
    save_weights(path, model, replace(first.info, config=model.config))
    assert starting_model(make_recipe(start={"weights": str(path)})).config.block_norm_eps == 1e-5
    reset = {"weights": str(path), "reset": ["encoder"]}
    assert starting_model(make_recipe(start=reset)).config.block_norm_eps == 1e-6


def test_weights_that_do_not_fit_are_refused(tmp_path):
    trainer_of(tmp_path).run(max_steps=1)
    path = str(tmp_path / "last.safetensors")
    for fields, message in (
        ({"model": {**MODEL, "head_width": 8}, "start": {"weights": path}}, "does not fit"),
        ({"start": {"weights": "none.safetensors"}}, r"start\.weights: none.*No such file"),
        ({"start": {"package": "no_such_package"}}, "only a timm encoder"),
        ({"teacher": {"weights": "${NOT_SET_ANYWHERE}"}}, "NOT_SET_ANYWHERE is not set"),
        (
            {"freeze": ["encoder", "segmentation_head"], "model": {**MODEL, "num_classes": None}},
            "no seg",
        ),
        ({"validation": {"datasets": {"v": "tiny:1"}, "best": ["v.miou"]}}, "metrics are abs_rel"),
    ):
        with pytest.raises(RecipeError, match=message):
            trainer_of(tmp_path / "other", **fields)


def test_the_weights_say_what_they_are(tmp_path):
    trainer_of(
        tmp_path,
        open_source=lambda _: Numbered(6, depth_kind="relative"),
        preprocessing="origin",
        depth_codec="origin",
        training_data="tiny things",
    ).run(max_steps=1)
    info = read_info(tmp_path / "last.safetensors")
    assert info.depth_codec.kind == "relative"
    assert info.preprocessing.mean == (0.485, 0.56, 0.406)
    assert (info.training_data, info.short_side_px) == ("tiny things", SIDE)


def test_a_student_learns_from_its_teacher(tmp_path):
    trainer_of(tmp_path / "teacher").run(max_steps=1)
    teacher = {"weights": str(tmp_path / "teacher" / "last.safetensors"), "depth": 1.0}
    data = [{"dataset": "tiny:4"}, {"dataset": "depth:4", "distil": True}]
    trainer = trainer_of(tmp_path / "student", teacher=teacher, data=data)
    shown = {}
    trainer.run(report=lambda _step, values: shown.update(values))
    assert shown["taught_classes"] > 0
    assert shown["taught_depth"] > 0
    assert not any(name.startswith("teacher") for name in trainer.model.state_dict())
