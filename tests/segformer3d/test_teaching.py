import pytest
import torch
from torch.nn import functional

from segformer3d.config import ModelConfig
from segformer3d.model import DenseOutputs, build_model
from segformer3d.recipe import TeacherSection
from segformer3d.teaching import Lessons, Teacher
from tests.segformer3d.training_parts import TINY

CONFIG = ModelConfig(variant=TINY, head_width=8, depth_activation="exp")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(CONFIG).eval()


def lessons_of(model, **options):
    section = TeacherSection(weights="unused", **options)
    return Lessons(section, Teacher(model), model.encoder.embed_dims, seed=0)


def test_a_teacher_says_what_its_network_says(model):
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    maps, said = Teacher(model)(x)
    assert len(maps) == 4
    torch.testing.assert_close(said.logits, expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(said.depth, expected.depth, rtol=1e-4, atol=1e-5)


def test_who_agrees_has_nothing_to_learn(model):
    lessons = lessons_of(model, depth=1.0)
    x = torch.randn(2, 3, 64, 64)
    terms = lessons([], Teacher(model)(x)[1], torch.tensor([True, True]), x)
    assert set(terms) == {"taught_classes", "taught_depth"}
    for loss, _ in terms.values():
        assert loss.total.abs() < 1e-4
        assert loss.weight > 0


def test_only_samples_that_are_asked_about_count(model):
    lessons = lessons_of(model, depth=0.5, temperature=2.0)
    x = torch.randn(3, 3, 64, 64)
    logits = torch.randn(3, 19, 16, 16, requires_grad=True)
    depth = (torch.rand(3, 1, 16, 16) + 1).requires_grad_()
    terms = lessons([], DenseOutputs(logits, depth), torch.tensor([False, True, False]), x)
    (classes, factor), (metres, depth_factor) = terms["taught_classes"], terms["taught_depth"]
    assert (factor, depth_factor) == (1.0, 0.5)
    said = Teacher(model)(x)[1]
    p = functional.softmax(said.logits[1] / 2, dim=0)
    divergence = (p * (p.log() - functional.log_softmax(logits[1] / 2, dim=0))).sum() * 4
    torch.testing.assert_close(classes.total, divergence)
    torch.testing.assert_close(metres.total, (depth[1].log() - said.depth[1].log()).abs().sum())
    (classes.total + metres.total).backward()
    for gradient in (logits.grad, depth.grad):
        assert torch.equal(gradient[[0, 2]], torch.zeros_like(gradient[[0, 2]]))
        assert gradient[1].abs().sum() > 0


def test_nobody_asked_is_nothing_learned(model):
    lessons = lessons_of(model, depth=1.0)
    logits = torch.randn(2, 19, 16, 16, requires_grad=True)
    outputs = DenseOutputs(logits, torch.ones(2, 1, 16, 16, requires_grad=True))
    terms = lessons([], outputs, torch.tensor([False, False]), torch.randn(2, 3, 64, 64))
    for loss, _ in terms.values():
        assert (loss.total, loss.weight) == (0, 0)


def test_hints_are_the_mean_cosine_distance_of_all_samples(model):
    lessons = lessons_of(model, features=2.0)
    x = torch.randn(2, 3, 64, 64)
    maps = [torch.randn_like(map_) for map_ in model.forward_features(x)]
    outputs = model.forward_heads(maps)
    terms = lessons(maps, outputs, torch.tensor([False, False]), x)
    loss, factor = terms["taught_features"]
    theirs = model.forward_features(x)
    expected = 0.0
    for hint, own, other in zip(lessons.hints, maps[1:], theirs[1:], strict=True):
        a, b = hint(own), other
        cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        expected += (1 - cosine).mean().item() / 3
    assert factor == 2.0
    assert (loss.total / loss.weight).item() == pytest.approx(expected, rel=1e-4)
    assert loss.weight == 2


def test_hints_are_taken_from_maps_of_half_the_width(model):
    lessons = lessons_of(model, features=1.0)
    x = torch.randn(2, 3, 64, 64)
    maps = [torch.randn_like(map_).bfloat16().requires_grad_() for map_ in model.encoder(x)]
    outputs, asked = DenseOutputs(None, None), torch.tensor([False, False])
    loss, _ = lessons(maps, outputs, asked, x)["taught_features"]
    exact = lessons([map_.float() for map_ in maps], outputs, asked, x)["taught_features"][0]
    torch.testing.assert_close(loss.total, exact.total)
    loss.total.backward()
    assert all(map_.grad.abs().sum() > 0 for map_ in maps[1:])
