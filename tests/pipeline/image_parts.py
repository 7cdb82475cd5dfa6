"""What the tests of still images share."""

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.sources.assets import DecodeLimits
from pipeline.sources.images import decode_image

LIMITS = DecodeLimits()


def pixels_of(data, limits=LIMITS):
    return decode_image(data, limits)[0]


def kind_of(data, limits=LIMITS):
    with pytest.raises(InputError) as caught:
        pixels_of(data, limits)
    return caught.value.kind


def distance(left, right):
    return np.abs(left.astype(int) - right.astype(int)).mean()
