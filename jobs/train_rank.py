"""One process of a training: what it is asked, the trainer that does it, and plain errors."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import JobError, UserError
from segformer3d.strict_yaml import StrictYamlError, parse_yaml

if TYPE_CHECKING:
    from segformer3d.recipe import Recipe
    from segformer3d.training import Trainer


@dataclass(frozen=True)
class TrainRequest:
    """What ``train`` is asked.

    Attributes:
        config: The recipe's file.
        output: Folder of the checkpoint, the weights and the logs.
        overrides: ``a.b=value`` each, the value read as YAML.
        max_minutes: Stop after so many minutes; None trains to the end.
        num_workers: Processes that train together; more than one through Ray Train.
        device: As torch names it; None takes a GPU if there is one.
    """

    config: str
    output: str
    overrides: tuple[str, ...] = ()
    max_minutes: float | None = None
    num_workers: int = 1
    device: str | None = None


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn what the model's package raises into the errors of the command line.

    Raises:
        UserError: The recipe, the weights or a data set cannot be used.
        JobError: The training cannot go on; the last checkpoint is kept.
    """
    from segformer3d.datasets import DatasetError
    from segformer3d.recipe import RecipeError
    from segformer3d.training import DivergedError

    try:
        yield
    except (RecipeError, DatasetError) as error:
        raise UserError(_line(error)) from None
    except DivergedError as error:
        raise JobError(_line(error)) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or _line(error)}"
        raise JobError(message) from None
    except RuntimeError as error:
        # torch has no better class for these.
        text = _line(error)
        if "out of memory" in text or "can't allocate memory" in text:
            message = f"no memory left: make phases.N.batch or crop_px smaller ({text[:120]})"
            raise JobError(message) from None
        if "Invalid device string" in text or "Expected one of cpu" in text or "CUDA" in text:
            raise UserError(text[:200]) from None
        raise


def load(request: TrainRequest) -> "Recipe":
    """Read the recipe and apply the overrides.

    Raises:
        UserError: One line that names the file or the key.
    """
    from segformer3d.recipe import RecipeError, load_recipe

    try:
        return load_recipe(request.config, _parsed(request.overrides))
    except RecipeError as error:
        raise UserError(_line(error)) from None


def make_trainer(request: TrainRequest, device: Any) -> "Trainer":
    """Set a rank's trainer up; its data sets are those that any command can name."""
    from jobs.datasets import open_any_dataset
    from segformer3d.training import Trainer

    recipe = load(request)
    return Trainer(recipe, Path(request.output), device=device, open_source=open_any_dataset)


def variables_of(request: TrainRequest) -> dict[str, str]:
    """Environment variables that the recipe names, for processes that do not inherit them."""
    text = load(request).model_dump_json()
    names = {first or second for first, second in re.findall(r"\$\{(\w+)\}|\$(\w+)", text)}
    return {name: os.environ[name] for name in sorted(names) if name in os.environ}


def _parsed(overrides: Sequence[str]) -> dict[str, Any]:
    fields = {}
    for item in overrides:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            message = f"--set {item}: write --set section.key=value"
            raise UserError(message)
        try:
            fields[name.strip()] = parse_yaml(value)
        except StrictYamlError as error:
            message = f"--set {item}: {error}"
            raise UserError(message) from None
    return fields


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
