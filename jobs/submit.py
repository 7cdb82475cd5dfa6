"""Hand a job to a cluster's Ray Jobs server; the job's URI is its output's."""

import os
import shlex
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from jobs.cluster import AUTH_SOURCES, OPEN_CLUSTER, require_token
from jobs.lease import Heartbeat, beat, take_lease
from jobs.runner import claim_job
from jobs.spec import JobSpec
from pipeline.errors import JobError, UserError
from pipeline.storage.opening import resolve_options

_ANSWER_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What ``submit`` returns.

    Attributes:
        url: The job's URI, which every other verb takes.
        submission_id: Ray's own name for it, for ``ray job logs``.
        address: The Jobs server.
    """

    url: str
    submission_id: str
    address: str


def submit_job(spec: JobSpec, address: str) -> Submission:
    """Claim the output here, then let the cluster plan and run.

    The weights travel through the job's folder, so the cluster needs neither their path nor this
    machine. Credentials do not travel: the cluster's own are used.

    Args:
        spec: The job; input and output must be reachable from the cluster.
        address: ``http://host:8265`` of the cluster's dashboard.

    Raises:
        UserError: If the cluster lets anyone in, does not answer, or refuses the token.
        JobError: If it does not take the job.
    """
    require_token()
    client = _client(address)
    job = claim_job(_with_endpoints(spec))
    lease = take_lease(job.store, "submitted")
    command = [sys.executable if _is_local(address) else "python", "-m", "jobs.cli", "resume"]
    command += [job.store.url, "--lease", str(lease)]
    try:
        submission_id = client.submit_job(
            entrypoint=shlex.join(command),
            runtime_env={"env_vars": _environment(job.spec)},
            metadata={"segformer3d_url": job.store.url},
        )
    except (RuntimeError, OSError) as error:
        beat(job.store, Heartbeat.now(lease, "ended"))
        message = f"{address} did not take the job: {_line(error)}"
        raise JobError(message) from None
    return Submission(url=job.store.url, submission_id=submission_id, address=address)


def _client(address: str) -> Any:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        message = f"--address {address}: write http://HOST:8265, the cluster's dashboard"
        raise UserError(message)
    _refuse_open_server(address)
    # Ray lets this variable and RAY_ADDRESS win over the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        message = f"--address {address}: the cluster refuses our token ({AUTH_SOURCES})"
        raise UserError(message) from None
    except (ConnectionError, RuntimeError, OSError) as error:
        message = f"--address {address}: no Ray Jobs server lets us in there: {_line(error)}"
        raise UserError(message) from None


def _refuse_open_server(address: str) -> None:
    """Ask without a token, with a deadline, which Ray's own client lacks."""
    question = f"{address.rstrip('/')}/api/version"
    try:
        with urllib.request.urlopen(question, timeout=_ANSWER_S):  # noqa: S310  # http(s) only
            pass
    except urllib.error.HTTPError:
        # Whoever it is, it wants to know who asks; what it says to our token comes next.
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        message = f"--address {address}: no Ray Jobs server answers there: {reason}"
        raise UserError(message) from None
    message = f"--address {address}: {OPEN_CLUSTER}"
    raise UserError(message)


def _with_endpoints(spec: JobSpec) -> JobSpec:
    """The spec with the endpoints and regions that this machine's environment gives it."""
    fields = spec.model_dump()
    for name, section in (("input", spec.input), ("output", spec.output)):
        options = resolve_options(section.storage.options())
        fields[name]["storage"] |= {"endpoint_url": options.endpoint_url, "region": options.region}
    return JobSpec.model_validate(fields)


def _environment(spec: JobSpec) -> dict[str, str]:
    """What the cluster needs to find the job's folder; never a credential."""
    storage = spec.output.storage
    found = {"RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
    if storage.endpoint_url is not None:
        found["AWS_ENDPOINT_URL"] = storage.endpoint_url
    if storage.region is not None:
        found["AWS_REGION"] = storage.region
    return found


def _is_local(address: str) -> bool:
    return "//127.0.0.1:" in address or "//localhost:" in address


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
