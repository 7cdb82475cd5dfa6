"""Hand a job to a cluster's Ray Jobs server; the job's URI is its output's."""

import os
import shlex
import sys
from dataclasses import dataclass
from typing import Any

from jobs.cluster import require_token_mode
from jobs.lease import take_lease
from jobs.runner import claim_job
from jobs.spec import JobSpec
from pipeline.errors import JobError, UserError
from pipeline.storage.opening import resolve_options


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
    """
    require_token_mode()
    client = _client(address)
    job = claim_job(spec)
    lease = take_lease(job.store, "submitted")
    command = [sys.executable if _is_local(address) else "python", "-m", "jobs.cli", "resume"]
    command += [job.store.url, "--lease", str(lease)]
    try:
        submission_id = client.submit_job(
            entrypoint=shlex.join(command),
            runtime_env={"env_vars": _environment(spec)},
            metadata={"segformer3d_url": job.store.url},
        )
    except (RuntimeError, OSError) as error:
        message = f"{address} did not take the job: {_line(error)}"
        raise JobError(message) from None
    return Submission(url=job.store.url, submission_id=submission_id, address=address)


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        message = f"--address {address}: write http://HOST:8265, the cluster's dashboard"
        raise UserError(message)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, OSError) as error:
        message = f"--address {address}: no Ray Jobs server lets us in there: {_line(error)}"
        raise UserError(message) from None


def _environment(spec: JobSpec) -> dict[str, str]:
    """What the cluster needs to find the job's folder; never a credential."""
    options = resolve_options(spec.output.storage.options())
    found = {"RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
    if options.endpoint_url is not None:
        found["AWS_ENDPOINT_URL"] = options.endpoint_url
    if options.region is not None:
        found["AWS_REGION"] = options.region
    return found


def _is_local(address: str) -> bool:
    return "//127.0.0.1:" in address or "//localhost:" in address


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
