"""Open a job: check what is asked for, load its weights, and make an output its own."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from jobs.generations import read_plans
from jobs.plan import Plan, read_plan
from jobs.planner import Planner, check_archive, check_assets, make_plan, open_output
from jobs.progress import say
from jobs.record import OUTPUT_VERSION, JobRecord, claim_output, read_job
from jobs.spec import JobSpec, RaySection
from pipeline.errors import ConflictError, JobError, StorageError, UserError
from pipeline.layout import JOB_KEY, Generation
from pipeline.storage import StorageOptions, Store, open_store, read_file
from pipeline.urls import shown

# Of the web; the largest SegFormer has 340 MB.
_MAX_WEIGHTS_BYTES = 4 << 30


@dataclass(frozen=True)
class OpenJob:
    """A job whose output is claimed and whose weights lie in it.

    Attributes:
        store: Its store.
        record: What it pins.
        spec: What was asked for.
        generation: The generation that is being made.
        planner: Makes what plans it; None plans the whole archive.
    """

    store: Store
    record: JobRecord
    spec: JobSpec
    generation: Generation
    planner: Callable[[], Planner] | None = None

    def plan(self) -> Plan:
        """The generation's plan, made if there is none."""
        plan = read_plan(self.store, self.generation)
        if plan is not None:
            return plan
        planner = self.planner() if self.planner is not None else Planner(self.spec)
        return make_plan(self.store, self.generation, planner)


def claim_job(spec: JobSpec) -> OpenJob:
    """Check the archive, load the weights, and make the output this job's."""
    check_archive(spec)
    weights = load_weights(spec)
    record = make_record(spec, weights)
    spec = sized_as(record, spec)
    store = open_output(spec)
    if not store.exists(JOB_KEY):
        # A wrong --input must not leave a job behind that then refuses the right one.
        check_assets(spec)
    held = claim_output(store, record, single_driver=spec.output.single_driver)
    if store.head(held.weights_key) is None:
        store.put(held.weights_key, weights)
    else:
        _check_weights(store, held, spec)
    return OpenJob(store, held, spec, newest_generation(store))


def reopen_job(url: str, storage: StorageOptions, ray: RaySection | None = None) -> OpenJob:
    """Open a job by its URI alone.

    Raises:
        UserError: If there is no job.
        JobError: If its weights are gone or not those it was made with.
    """
    store = open_store(url, storage)
    record = read_job(store)
    if record.output_version != OUTPUT_VERSION:
        message = (
            f"{store.url} was begun by a version with other outputs (output_version "
            f"{record.output_version} there, {OUTPUT_VERSION} here); finish it with that version"
        )
        raise ConflictError(message)
    spec = record.job_spec()
    if ray is not None:
        spec = spec.model_copy(update={"ray": ray})
    _check_weights(store, record, spec)
    return OpenJob(store, record, spec, newest_generation(store))


def _check_weights(store: Store, record: JobRecord, spec: JobSpec) -> None:
    """See that the job holds its weights; a driver may have died before it left them there."""
    there = store.head(record.weights_key) is not None
    weights = store.read(record.weights_key) if there else load_weights(spec)
    if hashlib.sha256(weights).hexdigest() != record.weights_sha256:
        place = record.weights_key if there else spec.model.weights
        message = f"{store.url}: {place} is not the weights file that the job was made with"
        raise JobError(message)
    if not there:
        store.put(record.weights_key, weights)


def load_weights(spec: JobSpec) -> bytes:
    """Bytes of the weights file that the spec names, or of the one in the package.

    Raises:
        UserError: If the file cannot be read.
    """
    if spec.model.weights is None:
        from segformer3d.weights_file import bundled_weights

        return bundled_weights()
    url = spec.model.weights
    try:
        return read_file(url, spec.input.storage.options(), max_web_bytes=_MAX_WEIGHTS_BYTES)
    except (StorageError, UserError) as error:
        message = f"weights {shown(url)}: {error}"
        raise UserError(message) from None


def make_record(spec: JobSpec, weights: bytes) -> JobRecord:
    """What ``job.json`` will say.

    Raises:
        UserError: If the weights are not a file of this project.
    """
    from segformer3d.labels import CLASSES
    from segformer3d.weights_file import WeightsError, check_weights

    try:
        info = check_weights(weights)
        if info.config.timm_name:
            # Else a driver needs no torch, which would take it two seconds and half a gigabyte.
            _check_by_torch(weights)
    except WeightsError as error:
        message = f"weights {spec.model.weights}: {error}"
        raise UserError(message) from None
    spec = spec.sized_for(info.short_side_px)
    if not info.trained:
        say("The weights are untrained: the outputs show that everything runs, not a street.")
    return JobRecord(
        spec=spec.recorded(),
        identity=spec.identity(),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        trained=info.trained,
        preprocessing=info.preprocessing.to_dict(),
        labels=[item.name for item in CLASSES],
        depth_codec=info.depth_codec.to_dict() if info.depth_codec else None,
        software_version=_version(),
    )


def sized_as(record: JobRecord, spec: JobSpec) -> JobSpec:
    """The spec with the size of frames that the record's weights gave it."""
    return spec.model_copy(update={"geometry": record.job_spec().geometry})


def _check_by_torch(weights: bytes) -> None:
    """As loading would: what layers an encoder of timm's has, only torch can tell."""
    from segformer3d.weights import model_from_bytes

    model_from_bytes(weights)


def newest_generation(store: Store) -> Generation:
    """The last generation that is planned, or the first if none is."""
    return Generation(max(0, len(read_plans(store)) - 1))


def _version() -> str:
    from importlib.metadata import version

    return version("segformer3d")
