"""Data sets by address: `KIND:FOLDER?option=value&...`, the form recipes and commands use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from segformer3d.datasets.camvid import CamVid
from segformer3d.datasets.cityscapes import Cityscapes
from segformer3d.datasets.folder import Folder
from segformer3d.datasets.origin import Origin
from segformer3d.datasets.pictures import Pictures
from segformer3d.datasets.sample import DatasetError, SampleSource
from segformer3d.datasets.synthetic import Scenes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Options = dict[str, str]

_MOST_DIGITS = 15


@dataclass(frozen=True)
class Kind:
    """One kind of data set.

    Attributes:
        open: Opens it, from the address's folder and options.
        options: The options it takes.
        has_folder: Whether its address names a folder.
    """

    open: Callable[[str, Options], SampleSource]
    options: tuple[str, ...] = ()
    has_folder: bool = True


def open_dataset(address: str, more_kinds: Mapping[str, Kind] | None = None) -> SampleSource:
    """Open the data set at an address.

    Args:
        address: Such as `camvid:/data/camvid?split=val` or `scenes:?first_seed=0&count=500`.
        more_kinds: Kinds that the caller knows besides `KINDS`, by name.

    Raises:
        DatasetError: The kind or an option is unknown, or the data are not there.
    """
    kinds = {**KINDS, **(more_kinds or {})}
    name, colon, rest = address.partition(":")
    if not colon or name not in kinds:
        raise DatasetError(
            f"{address}: no data set kind {name!r}; write KIND:FOLDER with one of "
            f"{', '.join(kinds)}"
        )
    kind = kinds[name]
    folder, _, query = rest.partition("?")
    if kind.has_folder and not folder:
        raise DatasetError(f"{address}: name a folder, as in {name}:FOLDER")
    if folder and not kind.has_folder:
        raise DatasetError(f"{address}: {name} has no folder, write {name}:?{query}")
    return kind.open(folder, _options(address, query, kind))


def _options(address: str, query: str, kind: Kind) -> Options:
    pairs = parse_qsl(query, keep_blank_values=True)
    options = dict(pairs)
    takes = f"takes {', '.join(kind.options)}" if kind.options else "takes none"
    if unknown := sorted(set(options) - set(kind.options)):
        raise DatasetError(f"{address}: unknown option {unknown[0]!r}; this kind {takes}")
    if len(options) < len(pairs):
        raise DatasetError(f"{address}: an option stands twice")
    return options


def _camvid(folder: str, options: Options) -> SampleSource:
    height_cm = _whole(options, "ground_depth_cm", 0)
    return CamVid(
        _path(folder), options.get("split", "val"), ground_depth_m=height_cm / 100 or None
    )


def _cityscapes(folder: str, options: Options) -> SampleSource:
    return Cityscapes(_path(folder), options.get("split", "val"))


def _origin(folder: str, options: Options) -> SampleSource:
    return Origin(_path(folder), options.get("split", "val"))


def _folder(folder: str, options: Options) -> SampleSource:
    return Folder(_path(folder) / options.get("split", ""), options.get("labels", "train_ids"))


def _pictures(folder: str, options: Options) -> SampleSource:
    return Pictures(_path(folder), _whole(options, "stride", 1, least=1))


def _scenes(_folder: str, options: Options) -> SampleSource:
    cache = _path(options["cache"]) if "cache" in options else None
    return Scenes(
        _whole(options, "first_seed", 0),
        _whole(options, "count", 500, least=1),
        per_drive=_whole(options, "per_drive", 1, least=1),
        cache=cache,
    )


def _path(folder: str) -> Path:
    """A shell leaves the tilde of `camvid:~/data` alone."""
    try:
        return Path(folder).expanduser()
    except RuntimeError:
        raise DatasetError(f"{folder}: no such user") from None


def _whole(options: Options, name: str, default: int, *, least: int = 0) -> int:
    text = options.get(name, str(default))
    is_whole = text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS
    if not is_whole or int(text) < least:
        raise DatasetError(
            f"option {name} must be a whole number from {least} on, not {text[:40]!r}"
        )
    return int(text)


KINDS: dict[str, Kind] = {
    "camvid": Kind(_camvid, ("split", "ground_depth_cm")),
    "cityscapes": Kind(_cityscapes, ("split",)),
    "folder": Kind(_folder, ("labels", "split")),
    "origin": Kind(_origin, ("split",)),
    "pictures": Kind(_pictures, ("stride",)),
    "scenes": Kind(_scenes, ("first_seed", "count", "per_drive", "cache"), has_folder=False),
}
"""The kinds that this package knows."""
