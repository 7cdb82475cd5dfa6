"""Labelled frames to train and to measure with; every data set gives `Sample`s."""

from segformer3d.datasets.registry import open_dataset
from segformer3d.datasets.sample import (
    COARSE_GROUPS,
    IDENTITY_GROUPS,
    DatasetError,
    DepthKind,
    Sample,
    SampleSource,
)

__all__ = [
    "COARSE_GROUPS",
    "IDENTITY_GROUPS",
    "DatasetError",
    "DepthKind",
    "Sample",
    "SampleSource",
    "open_dataset",
]
