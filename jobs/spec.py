"""What a user asks for: YAML, strictly checked, hashed where it decides the outputs.

``JobSpec`` is the whole file. ``JobSpec.identity`` is the part of it that decides what comes out;
two runs with one identity may share an output, any other pair may not.
"""

import os
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)

from pipeline.decode import DecodeLimits
from pipeline.errors import UserError
from pipeline.geometry import MAX_PIXELS, Geometry, short_side_of
from pipeline.storage import StorageOptions
from pipeline.urls import (
    check_endpoint,
    check_file_url,
    redact,
    refuse_credentials,
    without_query,
)
from segformer3d.strict_yaml import StrictYamlError, parse_yaml


class _Brief(reprlib.Repr):
    """Cuts what a user wrote to a line's length, after credentials are taken out of it."""

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(redact(x), level)

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out more digits than that.
        return super().repr_int(x, level) if x.bit_length() < 10_000 else "a huge number"


_BRIEFLY = _Brief()
_MAX_CHARS = 1 << 20
_MAX_SHORT_SIDE_PX = 4096
_BRIEFLY.maxlevel, _BRIEFLY.maxstring = 1, 80

# `true` is no number, nor is "3".
Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StorageSection(_Section):
    """How to reach a store; credentials are ambient (environment, profile, role), never here."""

    endpoint_url: str | None = Field(None, description="S3 endpoint; default AWS_ENDPOINT_URL.")
    region: str | None = Field(None, description="S3 region; default AWS_REGION.")
    anonymous: bool = Field(False, description="Read a public bucket without credentials.")

    @field_validator("endpoint_url")
    @classmethod
    def _is_endpoint(cls, url: str | None) -> str | None:
        if url:
            check_endpoint(url)
        return url

    def options(self) -> StorageOptions:
        """The same for the storage adapter."""
        return StorageOptions(
            endpoint_url=self.endpoint_url, region=self.region, anonymous=self.anonymous
        )


class InputSection(_Section):
    """The archive."""

    url: str = Field(description="Folder, file or glob; local or s3://.", min_length=1)
    exclude: tuple[str, ...] = Field((), description="Globs over paths relative to the folder.")
    storage: StorageSection = StorageSection()


class SamplingSection(_Section):
    """Which frames of a video are annotated; images always are."""

    every_nth: Whole = Field(1, ge=1, le=10**9, description="Every n-th frame, from the first.")
    frames_per_second: Number | None = Field(
        None,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="At most so many frames a second, chosen by time stamp.",
    )

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.frames_per_second is not None and self.every_nth != 1:
            message = "every_nth and frames_per_second exclude each other"
            raise ValueError(message)
        return self


class GeometrySection(_Section):
    """The size at which frames enter the model.

    Without a short side, whoever knows the weights gives it one (``JobSpec.sized_for``).
    """

    mode: Literal["keep_aspect", "stretch"] = "keep_aspect"
    short_side_px: Whole | None = Field(
        None,
        ge=32,
        le=_MAX_SHORT_SIDE_PX,
        multiple_of=32,
        description="Default that of the weights' training; 512 where they do not say.",
    )
    stretch_width_px: Whole = Field(1024, ge=32, le=8192, multiple_of=32)
    stretch_height_px: Whole = Field(512, ge=32, le=8192, multiple_of=32)

    def geometry(self) -> Geometry:
        """The same for the decoder."""
        return Geometry(
            mode=self.mode,
            short_side_px=self.short_side_px or short_side_of(None),
            stretch_size=(self.stretch_width_px, self.stretch_height_px),
        )


class ModelSection(_Section):
    """The network."""

    weights: str | None = Field(
        None,
        description="Path or URL (s3://, https://) of a safetensors file; none: that in the box.",
    )
    micro_batch: Whole | None = Field(
        None, ge=1, le=1024, description="Frames per forward pass at the most; default by device."
    )
    threads: Whole | None = Field(1, ge=1, le=1024, description="CPU threads per model.")


class OutputSection(_Section):
    """Where the job lives and what it writes besides Parquet."""

    url: str = Field(description="Folder of the job; local or s3://.", min_length=1)
    png: bool = Field(False, description="Also write the PNG tree.")
    class_ids_size: Literal["input", "asset"] = Field(
        "input", description="Class ids at the model's input size, or at each asset's own."
    )
    depth_size: Literal["grid", "asset"] = Field(
        "grid", description="Depth on the network's own grid, or resized to each asset's size."
    )
    storage: StorageSection = StorageSection()
    single_driver: bool = Field(
        False, description="Vouch for a single driver on a store without conditional writes."
    )


class ShardSection(_Section):
    """The unit of work and of commit."""

    frames: Whole = Field(
        64,
        ge=1,
        le=4096,
        description="Frames per shard, about; the first and the last have 16.",
    )


class LimitsSection(_Section):
    """Bounds on hostile or broken inputs."""

    max_pixels: Whole = Field(
        100_000_000, ge=1, le=2**31, description="Of a frame; above 2**28 is 2**28."
    )
    max_file_bytes: Whole = Field(256 * 2**20, ge=1, le=2**36, description="Of a still image.")
    deadline_s: Number = Field(
        60.0, ge=0.1, le=86_400, description="Without a new frame, an input has hung."
    )
    memory_bytes: Whole = Field(
        4 * 2**30, ge=2**28, le=2**44, description="Of one decoding process."
    )

    def limits(self) -> DecodeLimits:
        """The same for the decoder."""
        return DecodeLimits(
            max_pixels=min(self.max_pixels, MAX_PIXELS),
            max_file_bytes=self.max_file_bytes,
            deadline_s=self.deadline_s,
            memory_bytes=self.memory_bytes,
        )


class RaySection(_Section):
    """What the run may take of the machine or cluster; does not change outputs."""

    max_actors: Whole | None = Field(
        None, ge=1, le=10**6, description="Models at a time; default all."
    )
    max_io_tasks: Whole | None = Field(
        None,
        ge=1,
        le=10**6,
        description="Decode tasks at a time, and publish tasks, if staged; default one per CPU.",
    )
    graph: Literal["auto", "staged", "fused"] = Field(
        "auto",
        description="Decoding and publishing in tasks of their own, or all beside the model; auto: "
        "fused on the CPUs of one machine, staged on GPUs and on clusters.",
    )
    num_cpus: Whole | None = Field(None, ge=1, le=10**4, description="CPUs of the embedded Ray.")
    object_store_bytes: Whole | None = Field(
        None,
        ge=100 * 2**20,
        le=2**50,
        description="Object store of the embedded Ray; default 1 GiB, or 256 MiB per CPU.",
    )


class JobSpec(_Section):
    """One annotation job."""

    input: InputSection
    output: OutputSection
    sampling: SamplingSection = SamplingSection()
    geometry: GeometrySection = GeometrySection()
    model: ModelSection = ModelSection()
    shard: ShardSection = ShardSection()
    limits: LimitsSection = LimitsSection()
    ray: RaySection = RaySection()

    @model_validator(mode="before")
    @classmethod
    def _absolute(cls, fields: Any) -> Any:
        """A local path means the same wherever the job is resumed."""
        if not isinstance(fields, dict):
            return fields
        fields = dict(fields)
        for section, key in (("input", "url"), ("output", "url"), ("model", "weights")):
            held = fields.get(section)
            if isinstance(held, dict) and isinstance(held.get(key), str) and held[key]:
                refuse_credentials(held[key])
                if key == "weights":
                    check_file_url(held[key])
                fields[section] = {**held, key: _absolute_url(held[key])}
        return fields

    def sized_for(self, trained_px: int | None) -> Self:
        """The same, at the short side that weights were trained at, unless it names one."""
        if self.geometry.short_side_px is not None:
            return self
        side = {"short_side_px": min(short_side_of(trained_px), _MAX_SHORT_SIDE_PX)}
        return self.model_copy(update={"geometry": self.geometry.model_copy(update=side)})

    def recorded(self) -> dict[str, Any]:
        """All of it as plain data, without the query of the weights' URL: it may be a signature."""
        fields = self.model_dump(mode="json")
        if self.model.weights is not None:
            fields["model"]["weights"] = without_query(self.model.weights)
        return fields

    def identity(self) -> dict[str, Any]:
        """The settings that decide the outputs, by dotted name.

        Weights are not among them by name: their sha256 stands in the job's record.
        """
        fields = self.model_dump(mode="json")
        kept: dict[str, Any] = {
            "input.url": fields["input"]["url"],
            "input.exclude": fields["input"]["exclude"],
            "output.png": fields["output"]["png"],
            "output.class_ids_size": fields["output"]["class_ids_size"],
            "output.depth_size": fields["output"]["depth_size"],
            "shard.frames": fields["shard"]["frames"],
        }
        for section in ("sampling", "geometry", "limits"):
            kept |= {f"{section}.{name}": value for name, value in fields[section].items()}
        return kept


def _absolute_url(url: str) -> str:
    if url.startswith("file:///"):
        # One place, one name. An undecodable path stays a URL.
        path = unquote(url.removeprefix("file://"), errors="surrogateescape")
        return os.path.normpath(path) if path.isprintable() else url.rstrip("/")
    if "://" in url or "::" in url:
        return url if url.endswith("://") else url.rstrip("/")
    try:
        return os.path.normpath(Path(url).expanduser().absolute())
    except RuntimeError:
        message = f"{url}: no such user"
        raise UserError(message) from None


def load_spec(path: str | None, overrides: Sequence[str], flags: dict[str, str | None]) -> JobSpec:
    """Read, override and check a job.

    Args:
        path: A YAML file, or None to start from nothing.
        overrides: ``a.b=value`` each, the value read as YAML.
        flags: Dotted names to values of command-line options; None is not given.

    Raises:
        UserError: One line that names the key or the file.
    """
    fields = _read_yaml(path) if path is not None else {}
    for item in overrides:
        name, equals, value = item.partition("=")
        if not equals or not all(name.strip().split(".")):
            message = f"--set {_BRIEFLY.repr(item)}: write --set section.key=value"
            raise UserError(message)
        _assign(fields, name.strip(), _parse_yaml(value, f"--set {name}"))
    for name, given in flags.items():
        if given is not None:
            _assign(fields, name, given)
    return check_spec(fields, path or "the job")


def load_ray_section(overrides: Sequence[str]) -> RaySection:
    """The ``ray`` section from ``ray.key=value`` items, for a run of a job that exists.

    Raises:
        UserError: For any other key: nothing else of a job may change.
    """
    fields: dict[str, Any] = {}
    for item in overrides:
        name, _, value = item.partition("=")
        if not name.startswith("ray."):
            message = f"--set {item}: a job that exists takes only ray.KEY=VALUE"
            raise UserError(message)
        _assign(fields, name.strip(), _parse_yaml(value, f"--set {name}"))
    try:
        return RaySection.model_validate(fields.get("ray", {}))
    except ValidationError as error:
        raise UserError("; ".join(_complaint(item) for item in error.errors())) from None


def check_spec(fields: object, where: str) -> JobSpec:
    """Validate plain data.

    Raises:
        UserError: One line with every unknown, missing or bad key.
    """
    try:
        return JobSpec.model_validate(fields)
    except ValidationError as error:
        message = f"{where}: " + "; ".join(_complaint(item) for item in error.errors())
        raise UserError(message) from None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        # It may be a pipe, as a shell gives one for `<(...)`.
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_MAX_CHARS + 1)
    except FileNotFoundError:
        message = f"{path}: no such job file"
        raise UserError(message) from None
    except (OSError, ValueError) as error:
        message = f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"
        raise UserError(message) from None
    if len(text) > _MAX_CHARS:
        message = f"{path}: over {_MAX_CHARS // 2**20} MiB, which no job file is"
        raise UserError(message)
    fields = _parse_yaml(text, path)
    if not isinstance(fields, dict):
        message = f"{path}: a job is a mapping with the keys input and output"
        raise UserError(message)
    return fields


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return parse_yaml(text)
    except StrictYamlError as error:
        message = f"{where}: {error}"
        raise UserError(message) from None


def _assign(fields: dict[str, Any], name: str, value: object) -> None:
    *sections, key = name.split(".")
    for section in sections:
        child = fields.setdefault(section, {})
        if not isinstance(child, dict):
            message = f"--set {name}: {section} is not a section"
            raise UserError(message)
        fields = child
    fields[key] = value


def _complaint(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"]) or "the job"
    if item["type"] == "extra_forbidden":
        return f"unknown key {name}"
    if item["type"] == "missing":
        flag = {"input": "--input", "output": "--output"}.get(name)
        return f"missing key {name}" + (f" (or {flag})" if flag else "")
    message = item["msg"].removeprefix("Value error, ")
    return f"{name}: {message}, got {_BRIEFLY.repr(item['input'])}" if item["loc"] else message
