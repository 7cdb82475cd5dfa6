"""Recipes: what is refused and how it is said, epochs, variables, and the shipped ones."""

import pytest
import yaml

from segformer3d.config import METRIC_DEPTH, ORIGIN_DEPTH
from segformer3d.datasets.registry import KINDS
from segformer3d.recipe import RecipeError, codec_of, expanded, load_recipe
from tests.segformer3d.training_parts import make_recipe

LEAST = {
    "data": [{"dataset": "scenes:?"}],
    "phases": [{"steps": 3, "crop_px": [64, 64], "batch": 2}],
}


def write(tmp_path, fields):
    path = tmp_path / "recipe.yaml"
    path.write_text(fields if isinstance(fields, str) else yaml.safe_dump(fields))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speed": 3}, "unknown key speed"),
        ({"data": None}, "data: "),
        ({"data": []}, "data: "),
        ({"phases": [{"crop_px": [64, 64], "batch": 2}]}, "give steps or epochs"),
        ({"phases": [{"steps": 1, "epochs": 1, "crop_px": [64, 64], "batch": 2}]}, "one of them"),
        ({"phases": [{"steps": 1, "crop_px": [64, 65], "batch": 2}]}, "multiples of 32"),
        ({"augmentation": {"flipp": 1}}, "augmentation.flipp"),
        ({"augmentation": {"scale": [2, 1]}}, "scale"),
        ({"optimizer": {"rate": -1}}, "optimizer.rate"),
        ({"optimizer": {"rate": float("inf")}}, "optimizer.rate"),
        ({"loss": {"class_weights": [1, 2]}}, "loss.class_weights"),
        ({"loss": {"depth_kind": "guess"}}, "loss.depth_kind"),
        ({"loss": {"classes": 0, "depth": 0}}, "no loss"),
        ({"model": {"has_depth": False}, "loss": {"classes": 0}}, "no loss"),
        ({"freeze": ["encoder", "segmentation_head", "depth_head"]}, "nothing is left to learn"),
        ({"freeze": ["engine"]}, "freeze.0"),
        ({"seed": 2**31}, "seed"),
        ({"validation": {"best": ["val.mean_iou"]}}, "with a name of datasets: none"),
        ({"validation": {"datasets": {"v": "x"}, "best": ["v.loss"]}}, "losses: true"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(tmp_path, change, message):
    path = write(tmp_path, {**LEAST, **change})
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "a: \x00", "[" * 3000])
def test_no_yaml(tmp_path, text):
    with pytest.raises(RecipeError, match=r"YAML|mapping"):
        load_recipe(write(tmp_path, text))


def test_a_key_that_stands_twice(tmp_path):
    with pytest.raises(RecipeError, match="'rate' stands twice"):
        load_recipe(write(tmp_path, "optimizer: {rate: 1.0e-3, rate: 1.0e-4}"))


def test_no_file(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_overrides_reach_sections_lists_and_what_is_not_there(tmp_path):
    changes = {"phases.0.batch": 6, "optimizer.rate": 0.5, "data.0.share": 2, "seed": 4}
    recipe = load_recipe(write(tmp_path, LEAST), changes)
    assert recipe.phases[0].batch == 6
    assert (recipe.optimizer.rate, recipe.data[0].share, recipe.seed) == (0.5, 2, 4)
    for name in ("phases.3.batch", "phases.x.batch", "data.0.dataset.x"):
        with pytest.raises(RecipeError, match=name):
            load_recipe(write(tmp_path, LEAST), {name: 1})


def test_identity_tells_steps_and_not_how_they_were_asked_for():
    phase = {"crop_px": [64, 64], "batch": 4}
    steps = make_recipe(phases=[{**phase, "steps": 3}])
    epochs = make_recipe(phases=[{**phase, "epochs": 2}], checkpoint_minutes=9, loader_workers=3)
    with pytest.raises(ValueError, match="resolved"):
        _ = epochs.num_steps
    assert epochs.resolved([6]).num_steps == 3
    assert epochs.resolved([6]).identity() == steps.identity()
    assert epochs.resolved([7]).identity() != steps.identity()
    assert make_recipe(seed=1).identity() != make_recipe().identity()


def test_variables_and_homes(monkeypatch):
    monkeypatch.setenv("CAMVID", "/data/camvid")
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("camvid:${CAMVID}?split=val", "x") == "camvid:/data/camvid?split=val"
    assert expanded("camvid:$CAMVID/a", "x") == "camvid:/data/camvid/a"
    assert expanded("folder:~/a?split=b", "x") == "folder:/home/me/a?split=b"
    assert expanded("~/w.safetensors", "x") == "/home/me/w.safetensors"
    assert expanded("folder:data/a~b", "x") == "folder:data/a~b"
    monkeypatch.delenv("CAMVID")
    with pytest.raises(RecipeError, match=r"data\.0\.dataset: .*variable CAMVID is not set"):
        expanded("camvid:${CAMVID}", "data.0.dataset")
    with pytest.raises(RecipeError, match="no such user"):
        expanded("~nobody-of-that-name/x", "start.weights")


def test_the_origin_s_recipe_is_the_origin_s(project_root):
    recipe = load_recipe(project_root / "configs" / "train" / "origin.yaml")
    assert recipe.freeze == ("encoder", "segmentation_head")
    assert (recipe.optimizer.kind, recipe.optimizer.rate) == ("adam", 1e-2)
    assert (recipe.optimizer.weight_decay, recipe.optimizer.betas) == (0, (0.9, 0.999))
    assert (recipe.schedule.kind, recipe.schedule.rise) == ("onecycle", 0.3)
    assert recipe.schedule.start_div == 10
    phase = recipe.phases[0]
    assert (phase.epochs, phase.batch, phase.crop_px) == (200, 64, (128, 256))
    assert (recipe.loss.depth_kind, recipe.loss.classes, recipe.loss.depth) == ("mse", 1, 1)
    assert recipe.loss.weighting == "fixed"
    assert recipe.model.variant == "mit_b3"
    assert codec_of(recipe) == ORIGIN_DEPTH
    assert recipe.resolved([500]).num_steps == -(-200 * 500 // 64)


def test_the_recipes_of_the_weights_in_the_box_can_be_read(project_root, monkeypatch):
    for name in ("CAMVID", "DASHCAM", "SCENES", "START", "TEACHER"):
        monkeypatch.setenv(name, "somewhere")
    paths = sorted((project_root / "configs" / "train").glob("bundled*.yaml"))
    assert len(paths) == 11
    for path in paths:
        recipe = load_recipe(path)
        addresses = [item.dataset for item in recipe.data] + list(
            recipe.validation.datasets.values()
        )
        kinds = {address.partition(":")[0] for address in addresses}
        assert kinds <= set(KINDS)
        assert recipe.short_side_px == 352
        assert recipe.resolved([100] * len(recipe.data)).num_steps > 400


def test_the_multi_task_recipe_uses_what_there_is(project_root):
    recipe = load_recipe(project_root / "configs" / "train" / "multitask.yaml")
    assert recipe.model.variant == "mit_b2"
    assert recipe.optimizer.kind == "adamw"
    assert recipe.optimizer.layer_decay < 1
    assert recipe.schedule.warm_up_steps > 0
    assert recipe.ema_decay > 0.99
    assert recipe.precision == "bfloat16"
    assert recipe.loss.weighting == "uncertainty"
    assert recipe.clip_norm is not None
    assert codec_of(recipe) == METRIC_DEPTH
