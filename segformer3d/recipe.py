"""A training's recipe: strict YAML, one file says all of it."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from segformer3d.augment import Augmentation
from segformer3d.config import METRIC_DEPTH, ORIGIN_DEPTH, DepthCodec, ModelConfig
from segformer3d.labels import NUM_CLASSES
from segformer3d.strict_yaml import StrictYamlError, parse_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Whole = Annotated[int, Field(ge=1)]
Part = Literal["encoder", "segmentation_head", "depth_head"]

SEED_END = 2**31  # seeds are shifted by 32 bits and joined with the step
_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message is one line and says how to mend it."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """The network; unnamed fields as `ModelConfig`."""

    variant: str = "mit_b0"
    head_width: Whole = 256
    num_classes: int | None = NUM_CLASSES
    has_depth: bool = True
    depth_activation: Literal["identity", "exp"] = "identity"

    def config(self) -> ModelConfig:
        """As the model's own configuration."""
        return ModelConfig(**self.model_dump())


class StartSection(_Section):
    """Where parameters come from: our weights, or an encoder's ImageNet weights.

    Attributes:
        weights: A weights file of this project; heads that it lacks start anew.
        package: A Python package with an ImageNet state dict for the timm encoder.
        reset: Parts that start anew all the same.
    """

    weights: str | None = None
    package: str | None = None
    reset: tuple[Part, ...] = ()


class DataSection(_Section):
    """One data set and its share of each `sum(shares)` samples."""

    dataset: str
    share: Whole = 1
    distil: bool = False
    augmentation: Augmentation | None = None


class PhaseSection(_Section):
    """Some steps, or epochs, with crops of one size.

    Attributes:
        steps: How many steps it takes.
        epochs: How many passes over the data it takes instead: one ends when every data set has
            been seen in whole, the smaller of several more than once as the shares have it.
        crop_px: Height and width.
        batch: Samples per step, over all workers.
    """

    steps: Whole | None = None
    epochs: Positive | None = None
    crop_px: tuple[Whole, Whole]
    batch: Whole

    @model_validator(mode="after")
    def _fits(self) -> PhaseSection:
        if self.crop_px[0] % 32 or self.crop_px[1] % 32:
            raise ValueError(f"crop_px sides must be multiples of 32, not {self.crop_px}")
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give steps or epochs, one of them")
        return self

    @property
    def num_steps(self) -> int:
        """Its steps.

        Raises:
            ValueError: It is told in epochs, and the recipe was not resolved.
        """
        if self.steps is None:
            raise ValueError("epochs need Recipe.resolved first")
        return self.steps


class LossSection(_Section):
    """The losses and how they are weighed.

    Attributes:
        classes: Weight of the cross entropy.
        class_weights: Of each train id within it.
        overlap: Weight of one less the soft Jaccard index, in which rare classes count as much.
        depth_kind: Which depth loss; see `losses`.
        depth: Its weight.
        outside_delta1: Weight of the soft share of depths out by more than a factor 1.25.
        sky_depth_m: Depth that pixels of the class sky without a known one are drawn to.
        sky_weight: How strongly.
        stride: Looks at one pixel of each square of so many a side. The losses over all pixels
            take twice the time of a small network; over a quarter of them they teach as much.
        weighting: `uncertainty` learns a weight per task besides the fixed ones.
    """

    classes: Weight = 1.0
    class_weights: tuple[Positive, ...] | None = Field(None, min_length=19, max_length=19)
    overlap: Weight = 0.0
    depth_kind: Literal["mse", "inverse_huber", "scale_invariant_log", "log_l1", "relative"] = "mse"
    depth: Weight = 1.0
    outside_delta1: Weight = 0.0
    sky_depth_m: Positive | None = None
    sky_weight: Weight = 0.1
    stride: Annotated[int, Field(ge=1, le=4)] = 1
    weighting: Literal["fixed", "uncertainty"] = "fixed"


class TeacherSection(_Section):
    """A trained network to distil from.

    Attributes:
        weights: A weights file of this project.
        temperature: Softens the classes of both.
        classes: Weight of the divergence from its classes, on the data marked `distil`.
        depth: Weight of the log L1 distance from its depth, on the same.
        features: Weight of the cosine distance from its encoder's maps, on all data.
    """

    weights: str
    temperature: Positive = 1.0
    classes: Weight = 1.0
    depth: Weight = 0.0
    features: Weight = 0.0


class OptimizerSection(_Section):
    """The optimiser.

    Attributes:
        kind: `adam` adds the weight decay to the gradient, `adamw` decouples it.
        rate: The full learning rate; the schedule gives its share at each step.
        weight_decay: Of weights; never of norms and biases.
        betas: As torch's.
        layer_decay: The rate of each of the encoder's four stages is this share of the next one's.
        head_rate_factor: The heads' rate over the encoder's.
    """

    kind: Literal["adam", "adamw"] = "adamw"
    rate: Positive = 1e-3
    weight_decay: Weight = 0.01
    betas: tuple[Share, Share] = (0.9, 0.999)
    layer_decay: float = Field(1.0, gt=0, le=1)
    head_rate_factor: Positive = 1.0


class ScheduleSection(_Section):
    """The rate over time.

    Attributes:
        kind: `poly`, `onecycle` or `constant`.
        warm_up_steps: Of `poly`: linear rise at the start.
        power: Of `poly`.
        floor: Of `poly`: smallest share of the full rate.
        rise: Of `onecycle`: share of the steps that rise (torch's `pct_start`).
        start_div: Of `onecycle`: the full rate over the first one (torch's `div_factor`).
        momentum: Of `onecycle`: smallest and largest first beta, which falls as the rate rises
            (torch's `base_momentum` and `max_momentum`); None leaves it alone.
    """

    kind: Literal["poly", "onecycle", "constant"] = "poly"
    warm_up_steps: int = Field(0, ge=0)
    power: Positive = 1.0
    floor: float = Field(0.0, ge=0, le=1)
    rise: float = Field(0.3, gt=0, lt=1)
    start_div: Positive = 10.0
    momentum: tuple[Share, Share] | None = None


class ValidationSection(_Section):
    """What to measure, when, and what makes weights the best.

    Attributes:
        datasets: Addresses by the names that their metrics carry.
        every_steps: Steps between two validations; there is always one at the end.
        best: Metrics such as `val.mean_iou`, `-val.abs_rel`, `-val.loss`: the larger their sum
            the better, a minus takes one off.
        limit: Frames of each data set at the most.
        losses: Whether the recipe's losses are measured as well, as `NAME.loss`,
            `NAME.loss_classes` and `NAME.loss_depth`.
    """

    datasets: dict[str, str] = {}
    every_steps: Whole = 500
    best: tuple[str, ...] = ()
    limit: Whole | None = None
    losses: bool = False

    @model_validator(mode="after")
    def _known(self) -> ValidationSection:
        for name in self.best:
            dataset, dot, metric = name.removeprefix("-").rpartition(".")
            if not dot or dataset not in self.datasets:
                names = ", ".join(self.datasets) or "none"
                raise ValueError(
                    f"best: {name}: write NAME.METRIC with a name of datasets: {names}"
                )
            if metric.startswith("loss") and not self.losses:
                raise ValueError(f"best: {name} needs losses: true")
        return self


class Recipe(_Section):
    """A whole training."""

    seed: int = Field(0, ge=0, lt=SEED_END)
    model: ModelSection = ModelSection()
    start: StartSection = StartSection()
    freeze: tuple[Part, ...] = ()
    preprocessing: Literal["imagenet", "origin"] = "imagenet"
    depth_codec: Literal["metric", "origin"] = "metric"
    training_data: str = "not said"
    terms: str = ""
    short_side_px: Whole = 512
    data: tuple[DataSection, ...] = Field(min_length=1)
    augmentation: Augmentation = Augmentation()
    phases: tuple[PhaseSection, ...] = Field(min_length=1)
    loss: LossSection = LossSection()
    teacher: TeacherSection | None = None
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    ema_decay: float = Field(0.0, ge=0, lt=1)
    clip_norm: Positive | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    validation: ValidationSection = ValidationSection()
    checkpoint_minutes: Positive = 5.0
    loader_workers: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _learns(self) -> Recipe:
        heads = {"segmentation_head": self.loss.classes, "depth_head": self.loss.depth}
        if self.teacher is not None:
            heads["segmentation_head"] += self.teacher.classes
            heads["depth_head"] += self.teacher.depth
        if self.model.num_classes is None:
            heads.pop("segmentation_head")
        if not self.model.has_depth:
            heads.pop("depth_head")
        if not any(heads.values()):
            raise ValueError("no loss: give loss.classes or loss.depth of a head that is there")
        if {"encoder", *heads} <= set(self.freeze):
            raise ValueError("freeze: nothing is left to learn")
        return self

    @property
    def num_steps(self) -> int:
        """Steps of all phases; of a resolved recipe."""
        return sum(phase.num_steps for phase in self.phases)

    def resolved(self, lengths: Sequence[int]) -> Recipe:
        """Turn epochs into steps.

        Args:
            lengths: Samples of each data set, in the order of `data`.
        """
        shares = [section.share for section in self.data]
        cycles = max(-(-length // share) for length, share in zip(lengths, shares, strict=True))
        samples = min(cycles * sum(shares), sum(lengths) if len(lengths) == 1 else math.inf)
        phases = tuple(
            phase
            if phase.epochs is None
            else PhaseSection(
                steps=math.ceil(phase.epochs * samples / phase.batch),
                crop_px=phase.crop_px,
                batch=phase.batch,
            )
            for phase in self.phases
        )
        return self.model_copy(update={"phases": phases})

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with; how often to save and to look does not matter.

        Of a resolved recipe. What came later into recipes stands in it only where it is used, so
        that older checkpoints stay good.
        """
        free = {"checkpoint_minutes", "loader_workers", "validation"}
        fields = self.model_dump(mode="json", exclude=free)
        for phase in fields["phases"]:
            del phase["epochs"]
        if fields["schedule"]["momentum"] is None:
            del fields["schedule"]["momentum"]
        if fields["loss"]["stride"] == 1:
            del fields["loss"]["stride"]
        return fields


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe from a YAML file.

    Args:
        path: The file.
        overrides: Dotted names and values that replace the file's; whole numbers name items of
            lists, as in `phases.0.batch`.

    Raises:
        RecipeError: It cannot be read, or a key or a value is wrong.
    """
    try:
        fields = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror or error}") from None
    except (StrictYamlError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {error}") from None
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of names to values")
    for name, value in (overrides or {}).items():
        _assign(fields, name, value)
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        complaints = "; ".join(_complaint(item) for item in error.errors())
        raise RecipeError(f"{path}: {complaints}") from None


def expanded(text: str, where: str) -> str:
    """Put a home folder for `~` and environment variables for `${NAME}` into a path or address.

    Args:
        text: A path, or a data set's `KIND:FOLDER?options`.
        where: Named in the error.

    Raises:
        RecipeError: A variable or a user is unknown.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise RecipeError(f"{where}: {text}: the environment variable {name} is not set")
        return os.environ[name]

    text = _VARIABLE.sub(value, text)
    kind, colon, rest = text.partition(":")
    if colon and rest.startswith("~"):
        return f"{kind}:{_home(rest, where)}"
    return _home(text, where)


def codec_of(recipe: Recipe) -> DepthCodec | None:
    """Give the depth codec of what a recipe trains."""
    if not recipe.model.has_depth:
        return None
    return METRIC_DEPTH if recipe.depth_codec == "metric" else ORIGIN_DEPTH


def _home(text: str, where: str) -> str:
    if not text.startswith("~"):
        return text
    user, slash, rest = text.partition("/")
    try:
        return f"{Path(user).expanduser()}{slash}{rest}"
    except RuntimeError:
        raise RecipeError(f"{where}: {text}: no such user") from None


def _assign(fields: Any, name: str, value: object) -> None:
    *parents, last = name.split(".")
    try:
        for parent in parents:
            if isinstance(fields, list):
                fields = fields[int(parent)]
            else:
                if fields.get(parent) is None:
                    fields[parent] = {}
                fields = fields[parent]
        if isinstance(fields, list):
            fields[int(last)] = value
        else:
            fields[last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise RecipeError(f"{name}: there is nothing of that name to set") from None


def _complaint(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] == "extra_forbidden":
        return f"unknown key {name}"
    if item["type"] == "missing":
        return f"missing key {name}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" + (f", got {item['input']!r:.60}" if item["loc"] else "")
