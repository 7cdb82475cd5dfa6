"""A training's checkpoint: one file, whole or not at all, of one recipe and its data."""

from __future__ import annotations

from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from segformer3d.collective import gather
from segformer3d.files import replaced_whole
from segformer3d.recipe import RecipeError
from segformer3d.weights import read_pickle

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

REASON_CHARS_MAX = 120


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint; it replaces the one before only once it is whole and on the disk."""
    with replaced_whole(path) as file:
        torch.save(dict(state), file)


def read_checkpoint(
    path: Path, identity: Mapping[str, Any], lengths: Sequence[int], device: torch.device
) -> dict[str, Any] | None:
    """Read a checkpoint, if there is one, and see whether it belongs to this training.

    Args:
        path: The file, seen by all ranks.
        identity: Of the recipe.
        lengths: Samples of each data set: with others, other samples would follow.
        device: Where its tensors go.

    Raises:
        RecipeError: It is damaged, belongs to another recipe or other data, or is not the same
            for all ranks.
    """
    state = _load(path, device) if path.exists() else None
    if state is not None:
        _check(state, path, identity, lengths)
    steps = gather(None if state is None else state["progress"]["step"])
    if len(set(steps)) > 1:
        raise RecipeError(
            f"{path.parent}: the workers see different checkpoints; it must be one folder that "
            "all of them share"
        )
    return state


def reason(error: Exception) -> str:
    """Give an error's message, on one short line."""
    return " ".join(str(error).split())[:REASON_CHARS_MAX] or type(error).__name__


def _load(path: Path, device: torch.device) -> dict[str, Any]:
    try:
        state: dict[str, Any] = read_pickle(path, device)
        _ = state["recipe"], state["progress"]["step"]
    except UnpicklingError:
        raise RecipeError(
            f"{path}: damaged, or holds more than tensors and plain values, which could run code: "
            "it was not read; remove it to start anew"
        ) from None
    except Exception as error:  # noqa: BLE001  torch raises many kinds for a damaged file
        raise RecipeError(f"{path}: damaged, remove it to start anew: {reason(error)}") from None
    return state


def _check(
    state: Mapping[str, Any], path: Path, identity: Mapping[str, Any], lengths: Sequence[int]
) -> None:
    theirs = state["recipe"]
    if theirs != identity:
        names = [n for n in {**theirs, **identity} if theirs.get(n) != identity.get(n)]
        raise RecipeError(
            f"{path.parent} holds a training of another recipe ({', '.join(names)} differs): "
            "choose another folder"
        )
    for place, (before, now) in enumerate(zip(state.get("lengths", lengths), lengths, strict=True)):
        if before != now:
            raise RecipeError(
                f"data.{place}.dataset has {now} samples, but had {before} when the training in "
                f"{path.parent} began: choose another folder"
            )
