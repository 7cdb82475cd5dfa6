"""What a model is, as plain data: its sizes, its preprocessing and its depth codec.

Everything here is frozen, turns into a plain dict and back, and needs no torch. The encoder table
is that of SegFormer (Xie et al. 2021, arXiv 2105.15203, table 6).
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

DEPTH_INVALID = 0
DEPTH_CODE_MAX = 65535
METRIC_SCALE = 256.0  # codes per metre, as in KITTI

BLOCKS_MAX = 1000
WIDTH_MAX = 1 << 16
_TIMM_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_CUSTOM_MIT = re.compile(r"mit:(\d+(?:,\d+){3}):(\d+(?:,\d+){3})")


@dataclass(frozen=True, kw_only=True)
class MitSize:
    """The sizes of one Mix Transformer, shallowest stage first."""

    embed_dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    num_heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    sr_ratios: tuple[int, int, int, int] = (8, 4, 2, 1)
    mlp_ratio: int = 4
    paper_head_width: int = 256


_WIDE = (64, 128, 320, 512)

MIT_SIZES: Mapping[str, MitSize] = {
    "mit_b0": MitSize(embed_dims=(32, 64, 160, 256), depths=(2, 2, 2, 2)),
    "mit_b1": MitSize(embed_dims=_WIDE, depths=(2, 2, 2, 2)),
    "mit_b2": MitSize(embed_dims=_WIDE, depths=(3, 4, 6, 3), paper_head_width=768),
    "mit_b3": MitSize(embed_dims=_WIDE, depths=(3, 4, 18, 3), paper_head_width=768),
    "mit_b4": MitSize(embed_dims=_WIDE, depths=(3, 8, 27, 3), paper_head_width=768),
    "mit_b5": MitSize(embed_dims=_WIDE, depths=(3, 6, 40, 3), paper_head_width=768),
}


def mit_size(variant: str) -> MitSize:
    """Return the sizes of a Mix Transformer variant.

    Args:
        variant: `mit_b0` to `mit_b5`, or `mit:DIMS:DEPTHS` with four comma-separated numbers
            each, such as `mit:16,32,80,128:1,2,2,1`.

    Raises:
        ValueError: The name is neither.
    """
    if variant in MIT_SIZES:
        return MIT_SIZES[variant]
    match = _CUSTOM_MIT.fullmatch(variant)
    if match is None:
        raise ValueError(
            f"unknown model variant {variant!r}: use mit_b0 to mit_b5, "
            "mit:DIMS:DEPTHS (four numbers each) or timm:NAME"
        )
    size = MitSize(embed_dims=_four(match[1]), depths=_four(match[2]))
    for dim, heads in zip(size.embed_dims, size.num_heads, strict=True):
        if dim == 0 or dim % heads:
            raise ValueError(
                f"model variant {variant!r}: its width {dim} does not divide into {heads} heads"
            )
    if 0 in size.depths:
        raise ValueError(f"model variant {variant!r}: every stage needs at least one block")
    if max(size.depths) > BLOCKS_MAX or max(size.embed_dims) > WIDTH_MAX:
        raise ValueError(
            f"model variant {variant!r}: at most {BLOCKS_MAX} blocks a stage of width {WIDTH_MAX}"
        )
    return size


def mit_variant(embed_dims: tuple[int, ...], depths: tuple[int, ...]) -> str:
    """Return the variant name of a Mix Transformer of these sizes."""
    for name, size in MIT_SIZES.items():
        if (size.embed_dims, size.depths) == (embed_dims, depths):
            return name
    return f"mit:{','.join(map(str, embed_dims))}:{','.join(map(str, depths))}"


def _four(numbers: str) -> tuple[int, int, int, int]:
    first, second, third, fourth = (int(number) for number in numbers.split(","))
    return first, second, third, fourth


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one network.

    The layer-norm epsilons belong to the weights: the SegFormer authors and the origin project
    use 1e-5 in patch embeddings and reductions and 1e-6 elsewhere, `transformers` 1e-5
    everywhere.

    Attributes:
        variant: `mit_b0` to `mit_b5`, `mit:DIMS:DEPTHS`, or `timm:NAME`.
        head_width: Channels inside each head.
        num_classes: Classes of the segmentation head; None for no such head.
        has_depth: Whether there is a depth head.
        patch_norm_eps: Epsilon of the norms in patch embeddings and attention reductions.
        block_norm_eps: Epsilon of the norms of blocks and stages.
        head_norm_eps: Epsilon of the heads' batch norms.
        depth_activation: `identity`: the depth head's output is the depth; `exp`: it is the
            depth's natural logarithm, so that depth is positive and errors are relative.
    """

    variant: str = "mit_b0"
    head_width: int = 256
    num_classes: int | None = 19
    has_depth: bool = True
    patch_norm_eps: float = 1e-5
    block_norm_eps: float = 1e-6
    head_norm_eps: float = 1e-5
    depth_activation: Literal["identity", "exp"] = "identity"

    def __post_init__(self) -> None:
        _check_types(self)
        if not self.variant.startswith("timm:"):
            mit_size(self.variant)
        # Names with a colon or a slash make timm look on the network.
        elif _TIMM_NAME.fullmatch(self.timm_name) is None:
            raise ValueError(f"{self.variant!r}: a timm encoder has a name like resnet18")
        if not 1 <= self.head_width <= WIDTH_MAX:
            raise ValueError(f"head_width must be 1 to {WIDTH_MAX}, not {self.head_width}")
        for eps in (self.patch_norm_eps, self.block_norm_eps, self.head_norm_eps):
            if not 0 < eps < 1:
                raise ValueError(f"a norm's eps must be between 0 and 1, not {eps}")
        if self.num_classes is not None and not 1 <= self.num_classes <= 255:
            raise ValueError(f"num_classes must be 1 to 255 or null, not {self.num_classes}")
        if self.depth_activation not in ("identity", "exp"):
            raise ValueError(
                f"depth_activation must be identity or exp, not {self.depth_activation!r}"
            )
        if self.num_classes is None and not self.has_depth:
            raise ValueError("a model needs at least one head: set num_classes or has_depth")

    @property
    def timm_name(self) -> str:
        """Name of the timm encoder; empty for a Mix Transformer."""
        return self.variant.removeprefix("timm:") if self.variant.startswith("timm:") else ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build it from `to_dict`'s result; unknown or missing keys are refused."""
        return cls(**_exact(cls, data))


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a frame becomes the network's input: `(rgb / 255 - mean) / std`, per channel.

    Attributes:
        mean: Per channel, in the network's channel order.
        std: Per channel, in the network's channel order.
        channel_order: The order the network expects; frames are RGB.
    """

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    channel_order: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError("preprocessing: mean and std need three numbers each")
        if not all(math.isfinite(number) for number in self.mean):
            raise ValueError(f"preprocessing: mean must be finite, not {self.mean}")
        if not all(0 < number < math.inf for number in self.std):
            raise ValueError(f"preprocessing: std must be positive and finite, not {self.std}")
        if self.channel_order not in ("rgb", "bgr"):
            raise ValueError(
                f"preprocessing: channel_order must be rgb or bgr, not {self.channel_order!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "channel_order": self.channel_order,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build it from `to_dict`'s result; unknown or missing keys are refused."""
        values = _exact(cls, data)
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


IMAGENET_PREPROCESSING = Preprocessing()

# Its 0.56 is a slip for 0.456 that its weights are used to. They were trained on RGB; that its
# command line feeds BGR is a fault of the command line.
ORIGIN_PREPROCESSING = Preprocessing(mean=(0.485, 0.56, 0.406))


@dataclass(frozen=True, kw_only=True)
class DepthCodec:
    """How depth is written as 16-bit codes: `code = round(depth * scale)`, 0 where invalid.

    One codec serves a whole job. Non-finite and non-positive depths are invalid; valid ones are
    clipped to 1..65535.

    Attributes:
        kind: `metric` (metres, 256 codes each) or `relative` (see `meaning`).
        scale: Codes per unit of depth.
        meaning: What a decoded value means, for people.
        absolute_value: Whether the sign of the network's output carries no meaning and is
            dropped before encoding; only for `relative`.
    """

    kind: Literal["metric", "relative"] = "metric"
    scale: float = METRIC_SCALE
    meaning: str = "metres along the optical axis"
    absolute_value: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("metric", "relative"):
            raise ValueError(f"depth codec: kind must be metric or relative, not {self.kind!r}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"depth codec: scale must be positive and finite, not {self.scale}")
        if self.kind == "metric" and (self.scale != METRIC_SCALE or self.absolute_value):
            raise ValueError("depth codec: metric depth is always metres * 256, with its sign")

    def encode(self, depth: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
        """Encode depth of any shape as uint16 codes of the same shape."""
        values = np.asarray(depth, dtype=np.float32)
        if self.absolute_value:
            values = np.abs(values)
        valid = np.isfinite(values) & (values > 0)
        codes = np.where(valid, values, 0) * np.float32(self.scale)
        codes = np.clip(np.rint(codes), 1, DEPTH_CODE_MAX)
        return np.where(valid, codes, DEPTH_INVALID).astype(np.uint16)

    def decode(self, codes: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Decode uint16 codes of any shape to float32 depth, NaN where invalid."""
        depth = np.asarray(codes).astype(np.float32) / np.float32(self.scale)
        return np.where(np.asarray(codes) == DEPTH_INVALID, np.float32(np.nan), depth)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build it from `to_dict`'s result; unknown or missing keys are refused."""
        return cls(**_exact(cls, data))


METRIC_DEPTH = DepthCodec()

# The origin's values lie within about 0..4 and its sign is dropped in its pictures: a scale of
# 4096 keeps values up to 16 and steps of 1/4096.
ORIGIN_DEPTH = DepthCodec(
    kind="relative",
    scale=4096.0,
    meaning="relative inverse depth, 10 x the origin's stored map; larger is nearer, no unit",
    absolute_value=True,
)


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """What a weights file says about itself.

    Attributes:
        config: The network the weights fit.
        preprocessing: What the network expects as input.
        depth_codec: How its depth is encoded; None exactly when there is no depth head.
        training_data: What it was trained on, for people.
        trained: False for randomly initialised weights.
        short_side_px: Frames' short side in training; None if unknown. Metric depth is right for
            frames of that size, and `Predictor` scales it for others: a picture twice the size
            looks as if everything were twice as near.
        terms: What the weights may be used for; empty if nobody said.
        quality: What was measured, by name, on data that was not trained on.
    """

    config: ModelConfig
    preprocessing: Preprocessing = IMAGENET_PREPROCESSING
    depth_codec: DepthCodec | None
    training_data: str
    trained: bool = True
    short_side_px: int | None = None
    terms: str = ""
    quality: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.training_data, str) and isinstance(self.terms, str)):
            raise ValueError("training_data and terms are text")
        if not all(type(value) in (int, float) for value in dict(self.quality).values()):
            raise ValueError("quality holds numbers by name")
        if self.short_side_px is not None and self.short_side_px < 1:
            raise ValueError(f"short_side_px must be positive or null, not {self.short_side_px}")
        if self.config.has_depth != (self.depth_codec is not None):
            raise ValueError("a depth codec belongs to weights with a depth head, and only to them")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON types, nested."""
        return {
            "config": self.config.to_dict(),
            "preprocessing": self.preprocessing.to_dict(),
            "depth_codec": self.depth_codec.to_dict() if self.depth_codec else None,
            "training_data": self.training_data,
            "trained": self.trained,
            "short_side_px": self.short_side_px,
            "terms": self.terms,
            "quality": dict(self.quality),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Build it from `to_dict`'s result; unknown or missing keys are refused."""
        values = _exact(cls, data)
        codec = values["depth_codec"]
        return cls(
            config=ModelConfig.from_dict(values["config"]),
            preprocessing=Preprocessing.from_dict(values["preprocessing"]),
            depth_codec=None if codec is None else DepthCodec.from_dict(codec),
            training_data=values["training_data"],
            trained=values["trained"],
            short_side_px=values["short_side_px"],
            terms=values["terms"],
            quality=values["quality"],
        )


def _check_types(value: ModelConfig) -> None:
    """Refuse a field that is not what it says: it may come from anybody's file."""
    eps = (int, float)
    kinds: dict[str, tuple[type, ...]] = {
        "variant": (str,),
        "head_width": (int,),
        "num_classes": (int, type(None)),
        "has_depth": (bool,),
        "patch_norm_eps": eps,
        "block_norm_eps": eps,
        "head_norm_eps": eps,
        "depth_activation": (str,),
    }
    for name, allowed in kinds.items():
        if type(getattr(value, name)) not in allowed:
            words = " or ".join(kind.__name__ for kind in allowed)
            raise ValueError(f"{name} must be {words}, not {getattr(value, name)!r}")


def _exact(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    names = {item.name for item in fields(cls)}
    if unknown := sorted(set(data) - names):
        raise ValueError(f"{cls.__name__}: unknown keys: {', '.join(unknown)}")
    if missing := sorted(names - set(data)):
        raise ValueError(f"{cls.__name__}: missing keys: {', '.join(missing)}")
    return dict(data)
