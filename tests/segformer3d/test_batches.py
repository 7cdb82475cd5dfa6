"""Which sample comes when: whole shares, whole epochs, the same for any number of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch

from segformer3d import batches as batches_module
from segformer3d.batches import Mixture, open_sources
from segformer3d.labels import CAMVID_GROUPS, IGNORE_ID
from segformer3d.recipe import RecipeError
from tests.segformer3d.training_parts import SIDE, Numbered, make_recipe, open_numbered


def mixture(**fields):
    recipe = make_recipe(**fields)
    sources = open_sources(recipe, open_numbered)
    recipe = recipe.resolved([len(source) for source in sources])
    return Mixture(recipe, sources)


def test_shares_are_exact_and_even():
    data = [{"dataset": "tiny:5", "share": 2}, {"dataset": "coarse:4", "share": 1}]
    mixed = mixture(data=data)
    sources = [mixed.pick(number)[0] for number in range(300)]
    assert Counter(sources) == {0: 200, 1: 100}
    assert all(Counter(sources[i : i + 3]) == {0: 2, 1: 1} for i in range(0, 300, 3))


def test_each_epoch_covers_every_sample_once_in_another_order():
    mixed = mixture(data=[{"dataset": "tiny:7"}])
    epochs = [[mixed.pick(7 * epoch + n)[1] for n in range(7)] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_epochs_become_steps_that_cover_all_samples():
    phases = [{"epochs": 3, "crop_px": [SIDE, SIDE], "batch": 4}]
    assert len(mixture(data=[{"dataset": "tiny:10"}], phases=phases)) == 8  # 30 samples
    data = [{"dataset": "tiny:10", "share": 2}, {"dataset": "coarse:9", "share": 1}]
    mixed = mixture(data=data, phases=phases)
    assert len(mixed) == -(-3 * 9 * 3 // 4)
    drawn = Counter(mixed.pick(number) for number in range(3 * 9 * 3))
    assert all(drawn[1, index] == 3 for index in range(9))
    assert all(drawn[0, index] >= 3 for index in range(10))


def test_phases_follow_each_other_without_a_gap():
    phases = [
        {"steps": 2, "crop_px": [64, 64], "batch": 4},
        {"steps": 3, "crop_px": [32, 64], "batch": 2},
    ]
    mixed = mixture(data=[{"dataset": "tiny:14"}], phases=phases)
    shapes = [tuple(mixed[step].image.shape) for step in range(len(mixed))]
    assert shapes == [(4, 3, 64, 64)] * 2 + [(2, 3, 32, 64)] * 3
    assert sorted(mixed.pick(number)[1] for number in range(14)) == list(range(14))


def test_the_ranks_share_the_very_same_samples(monkeypatch):
    fields = {
        "data": [{"dataset": "tiny:5", "share": 2}, {"dataset": "coarse:4"}],
        "augmentation": {"scale": [0.7, 1.4], "flip": 0.5, "colour": 0.5, "focus": 0.5},
    }
    alone = mixture(**fields)
    monkeypatch.setattr(batches_module, "world_size", lambda: 2)
    ranks = []
    for number in (0, 1):
        monkeypatch.setattr(batches_module, "rank", lambda number=number: number)
        ranks.append(mixture(**fields))
    for step in range(3):
        whole, parts = alone[step], [part[step] for part in ranks]
        for name in ("image", "class_ids", "depth", "distil"):
            joined = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(joined, getattr(whole, name))
        assert whole.groups[::2] == parts[0].groups
        assert whole.groups[1::2] == parts[1].groups


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr(batches_module, "world_size", lambda: 3)
    with pytest.raises(RecipeError, match=r"phases\.0\.batch: 4 .* among 3 workers"):
        mixture()


def test_what_a_sample_lacks_is_unknown():
    data = [{"dataset": "coarse:2"}, {"dataset": "depth:2", "distil": True}]
    batch = mixture(data=data)[0]
    coarse = torch.tensor([group == CAMVID_GROUPS for group in batch.groups])
    assert coarse.sum() == 2
    assert (batch.depth[coarse] == 0).all()
    assert (batch.class_ids[~coarse] == IGNORE_ID).all()
    assert (batch.depth[~coarse] > 0).all()
    assert torch.equal(batch.distil, ~coarse)
    assert (batch.image.dtype, batch.class_ids.dtype) == (torch.uint8, torch.int64)


def test_a_step_is_the_same_whenever_it_is_asked_for():
    fields = {"augmentation": {"scale": [0.5, 2.0], "flip": 0.5}}
    one, two = mixture(**fields), mixture(**fields)
    late = two[3]
    for step in range(4):
        batch = one[step]
    np.testing.assert_array_equal(batch.image, late.image)
    assert torch.equal(batch.depth, late.depth)


@pytest.mark.parametrize(
    ("source", "codec", "message"),
    [
        (Numbered(0), "metric", "is empty"),
        (Numbered(3, depth_kind="relative"), "metric", "its depth is relative"),
        (Numbered(3), "origin", "its depth is metric"),
    ],
)
def test_data_that_do_not_fit_are_refused(source, codec, message):
    with pytest.raises(RecipeError, match=message):
        open_sources(make_recipe(depth_codec=codec), lambda _address: source)
