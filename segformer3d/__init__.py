"""Multi-task SegFormer: semantic segmentation and depth of street scenes from one encoding.

The names below are loaded on first use, so that `import segformer3d` never imports torch:
decode and publish workers need only the configuration and the labels.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segformer3d.attention import AttentionProbe, StageAttention
    from segformer3d.config import DepthCodec, ModelConfig, Preprocessing, WeightsInfo
    from segformer3d.model import DenseOutputs, Segformer3D, build_model
    from segformer3d.predictor import Predictions, Predictor
    from segformer3d.weights import (
        import_weights,
        load_weights,
        model_from_bytes,
        save_weights,
        untrained_weights,
    )
    from segformer3d.weights_file import WeightsError, bundled_weights, check_weights, read_info

__all__ = [
    "AttentionProbe",
    "DenseOutputs",
    "DepthCodec",
    "ModelConfig",
    "Predictions",
    "Predictor",
    "Preprocessing",
    "Segformer3D",
    "StageAttention",
    "WeightsError",
    "WeightsInfo",
    "build_model",
    "bundled_weights",
    "check_weights",
    "import_weights",
    "load_weights",
    "model_from_bytes",
    "read_info",
    "save_weights",
    "untrained_weights",
]

_HOMES = {
    "segformer3d.attention": ("AttentionProbe", "StageAttention"),
    "segformer3d.config": ("DepthCodec", "ModelConfig", "Preprocessing", "WeightsInfo"),
    "segformer3d.model": ("DenseOutputs", "Segformer3D", "build_model"),
    "segformer3d.predictor": ("Predictions", "Predictor"),
    "segformer3d.weights": (
        "import_weights",
        "load_weights",
        "model_from_bytes",
        "save_weights",
        "untrained_weights",
    ),
    "segformer3d.weights_file": (
        "WeightsError",
        "bundled_weights",
        "check_weights",
        "read_info",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module that defines `name` and return it."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
