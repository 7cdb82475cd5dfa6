"""Whether two predictions of the same frames are the same.

Not to the bit: where a buffer happens to lie decides how MKL and oneDNN round, and one input in
twenty came out a last bit away from its first time.
"""

import numpy as np


def assert_same_predictions(actual, expected):
    assert (actual.finite == expected.finite).all()
    if expected.class_ids is not None:
        assert_same_class_ids(actual.class_ids, expected.class_ids)
        np.testing.assert_allclose(actual.confidence_mean, expected.confidence_mean, rtol=1e-4)
        np.testing.assert_allclose(actual.entropy_mean, expected.entropy_mean, rtol=1e-4)
    if expected.depth is not None:
        assert_same_depth_codes(actual.depth, expected.depth)


def assert_same_class_ids(actual, expected):
    assert actual.shape == expected.shape
    assert (actual == expected).mean() > 0.999


def assert_same_depth_codes(actual, expected):
    np.testing.assert_allclose(actual.astype(int), expected.astype(int), atol=2)
