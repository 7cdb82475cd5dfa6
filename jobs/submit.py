"""Hand a job to a cluster's Ray Jobs server; the job's URI is its output's."""

import json
import os
import shlex
import sys
import uuid
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from jobs.claim import claim_job
from jobs.cluster import AUTH_SOURCES, OPEN_CLUSTER, require_token
from jobs.lease import Heartbeat, beat, take_lease
from jobs.spec import JobSpec
from pipeline.errors import JobError, UserError
from pipeline.storage.opening import resolve_options
from pipeline.urls import refuse_credentials, shown
from pipeline.web import NoRedirects

_ANSWER_S = 10.0
_SUBMIT_S = 60.0


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
    server = _JobsServer(address)
    server.check()
    job = claim_job(_with_endpoints(spec))
    lease = take_lease(job.store, "submitted")
    # -P: what lies in the folder where the cluster starts it is nobody's module.
    command = [sys.executable if _is_local(address) else "python", "-P", "-m", "jobs.cli"]
    command += ["resume", job.store.url, "--lease", str(lease)]
    submission_id = f"segformer3d-{uuid.uuid4().hex}"
    try:
        server.submit(
            {
                "entrypoint": shlex.join(command),
                "submission_id": submission_id,
                "runtime_env": {"env_vars": _environment(job.spec)},
                "metadata": {"segformer3d_url": job.store.url},
            }
        )
    except (OSError, HTTPException) as error:
        beat(job.store, Heartbeat.now(lease, "ended"))
        message = f"{address} did not take the job: {_reason(error)}"
        raise JobError(message) from None
    return Submission(url=job.store.url, submission_id=submission_id, address=address)


class _JobsServer:
    """Ray's REST interface for jobs.

    Its own client waits for ever, and lets RAY_ADDRESS win over the address that it is given.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            # Without a scheme nothing tells a password from what else stands before an @.
            named = "" if "@" in address else f" {shown(address)}"
            message = f"--address{named}: write http://HOST:8265, the cluster's dashboard"
            raise UserError(message)
        refuse_credentials(address)
        self.address = address.rstrip("/")

    def check(self) -> None:
        """Make sure that it answers, to us and not to anyone.

        Raises:
            UserError: Otherwise.
        """
        where = f"--address {self.address}"
        if self._status(with_token=False, where=where) == HTTPStatus.OK:
            message = f"{where}: {OPEN_CLUSTER}"
            raise UserError(message)
        status = self._status(with_token=True, where=where)
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}:
            message = f"{where}: the cluster refuses our token ({AUTH_SOURCES})"
            raise UserError(message)
        if status != HTTPStatus.OK:
            message = f"{where}: no Ray Jobs server answers there (HTTP {status})"
            raise UserError(message)

    def submit(self, fields: dict[str, Any]) -> None:
        """Hand a job over.

        Raises:
            OSError: If it is not taken.
            HTTPException: If the answer breaks off.
        """
        self._ask("/api/jobs/", _SUBMIT_S, with_token=True, data=json.dumps(fields).encode())

    def _status(self, *, with_token: bool, where: str) -> int:
        try:
            self._ask("/api/version", _ANSWER_S, with_token=with_token)
        except HTTPError as error:
            error.close()
            return error.code
        except (OSError, ValueError, HTTPException) as error:
            message = f"{where}: no Ray Jobs server answers there: {_reason(error)}"
            raise UserError(message) from None
        return HTTPStatus.OK

    def _ask(
        self, path: str, timeout_s: float, *, with_token: bool, data: bytes | None = None
    ) -> None:
        from ray._private.authentication.http_token_authentication import (
            get_auth_headers_if_auth_enabled,
        )

        headers = {"Content-Type": "application/json"}
        if with_token:
            headers |= get_auth_headers_if_auth_enabled({})
        request = Request(self.address + path, data, headers)  # noqa: S310  # http(s) only
        # Nobody may send the token elsewhere, nor a proxy of the environment see it.
        opener = build_opener(NoRedirects, ProxyHandler({}))
        with opener.open(request, timeout=timeout_s) as answer:
            answer.read()


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


def _reason(error: Exception) -> str:
    """What went wrong, in one line; the server says the cause at the end of its answer."""
    if isinstance(error, HTTPError):
        with error:
            said = error.read(100_000).decode(errors="replace").split("\n")
        lines = [line.strip() for line in said if line.strip()]
        return f"HTTP {error.code} {lines[-1] if lines else error.reason}"
    return str(getattr(error, "reason", None) or error or type(error).__name__)
