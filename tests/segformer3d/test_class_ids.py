"""Class ids from the H / 4 grid: compiled for CPUs, by bands for GPUs, against the plain way."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional

from segformer3d import class_ids
from segformer3d.class_ids import resolve_class_ids
from segformer3d.native import resolve
from tests.segformer3d.test_predictor import assert_ids_are_the_largest

SIZES = [(64, 96), (45, 77), (108, 131), (12, 20), (16, 24), (1, 300)]


def compiled(logits, size):
    return resolve_class_ids(logits, size)[0]


def by_bands(band_floats):
    return partial(class_ids._by_bands, band_floats=band_floats)


def logits_of(kind):
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(2, 19, *((16, 24) if kind == "random" else (4, 6)), generator=generator)
    return functional.interpolate(small, size=(16, 24), mode="bicubic")


@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", [compiled, by_bands(1), by_bands(20_000), by_bands(2**19)])
def test_class_ids_are_those_of_resizing_then_argmax(kind, size, way):
    logits = logits_of(kind)
    full = functional.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)
    ids = way(logits, size)
    assert ids.dtype == torch.uint8
    assert ids.shape == (2, *size)
    assert_ids_are_the_largest(ids, full)


@pytest.mark.parametrize("factor", [0.01, 1.0, 30.0])
def test_confidence_and_entropy_are_those_of_the_softmax(factor):
    logits = factor * logits_of("random")
    _, confidence, entropy = resolve_class_ids(logits, (16, 24))
    p = logits.double().softmax(1)
    expected = p.amax(1).mean((1, 2)), -torch.special.xlogy(p, p).sum(1).mean((1, 2))
    for numbers, wanted, bands in zip(
        (confidence, entropy), expected, class_ids._confidence_and_entropy(logits), strict=True
    ):
        assert numbers.dtype == torch.float32
        torch.testing.assert_close(numbers.double(), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bands.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_classes", [1, 2, 255])
def test_any_number_of_classes(num_classes):
    torch.manual_seed(0)
    logits = torch.randn(1, num_classes, 5, 7)
    ids, confidence, entropy = resolve_class_ids(logits, (20, 28))
    full = functional.interpolate(logits.double(), size=(20, 28), mode="bilinear")
    assert (ids == full.argmax(1)).float().mean() > 0.999
    assert 1 / num_classes <= float(confidence) <= 1
    assert 0 <= float(entropy) <= np.log(num_classes)


def test_of_equals_the_first_is_taken():
    ids = np.full((8, 8), 9, np.uint8)
    confidence, entropy = resolve(np.zeros((2, 2, 4), np.float32), ids)
    assert (ids == 0).all()
    assert confidence == pytest.approx(0.25)
    assert entropy == pytest.approx(np.log(4))
