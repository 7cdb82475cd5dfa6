"""The S3 clients behind ``S3Store``, and what their exceptions mean.

Credentials come from botocore's chain for both, and obstore renews them through it.
"""

import os
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import (
    AlreadyExistsError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store as ObjectStore

from pipeline.errors import (
    CredentialsError,
    ObjectExistsError,
    ObjectForbiddenError,
    ObjectNotFoundError,
    StorageError,
    StoreUnavailableError,
    UserError,
)
from pipeline.storage.base import StorageOptions
from pipeline.urls import check_endpoint

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from obstore.store import ClientConfig, RetryConfig

_DEFAULT_REGION = "us-east-1"
_CONNECT_TIMEOUT_S = 5
_STALL_TIMEOUT_S = 30
_PUT_TIMEOUT_S = 300
# obstore's own limit of 30 s for a whole request would end the download of any large file.
_WHOLE_TIMEOUT_S = 24 * 3600
_RETRY_TIMEOUT_S = 60
_MAX_RETRIES = 6
_MAX_BACKOFF_S = 5
# obstore renews 5 minutes before this age, botocore hands out nothing within 10 of its expiry.
_CREDENTIALS_TTL = timedelta(minutes=10)
_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_BODY = re.compile(r"(?<=status code: )(\d{3}[^:\n]*):.*", re.DOTALL)
_TRANSIENT = {"RequestTimeout", "SlowDown", "Throttling", "408", "429"}
_BAD_CREDENTIALS = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_MAX_REASON_CHARS = 300


class BeyondEndError(StorageError):
    """A range that starts at or after the end of the object."""


_KINDS: dict[type[StorageError], tuple[tuple[type[Exception], ...], set[int], str]] = {
    ObjectNotFoundError: ((FileNotFoundError,), {404}, "no such object"),
    ObjectForbiddenError: (
        (PermissionDeniedError, UnauthenticatedError),
        {401, 403},
        "access denied",
    ),
    ObjectExistsError: ((AlreadyExistsError, PreconditionError), {409, 412}, "exists already"),
    BeyondEndError: ((), {416}, "the range starts beyond the end"),
}


@dataclass(frozen=True, kw_only=True)
class Clients:
    """One bucket's clients, each thread-safe.

    Attributes:
        boto: For listings, deletions and the keys that obstore refuses.
        reader: Ends a read that stalls, however long the object.
        writer: Ends a write that takes too long as a whole.
    """

    boto: "S3Client"
    reader: ObjectStore
    writer: ObjectStore


def connect(bucket: str, options: StorageOptions) -> Clients:
    """Build the clients, without a request to the store.

    Raises:
        UserError: There are no credentials, or the profile is wrong.
    """
    try:
        session = boto3.Session()
        region = options.region or session.region_name or _DEFAULT_REGION
        boto, endpoint_url = _boto_client(session, region, options)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"cannot set up access to s3://{bucket}: {error}") from error
    arguments: dict[str, Any] = {
        "region": region,
        "conditional_put": "etag",
        "skip_signature": options.anonymous,
        "virtual_hosted_style_request": endpoint_url is None and "." not in bucket,
        "retry_config": _retries(),
    }
    if endpoint_url is not None:
        arguments["endpoint"] = endpoint_url
    if not options.anonymous:
        arguments["credential_provider"] = _credentials(session, bucket)
    return Clients(
        boto=boto,
        reader=_object_store(bucket, arguments, read_timeout_s=_STALL_TIMEOUT_S),
        writer=_object_store(bucket, arguments, timeout_s=_PUT_TIMEOUT_S),
    )


def _boto_client(
    session: boto3.Session, region: str, options: StorageOptions
) -> tuple["S3Client", str | None]:
    """The client and its endpoint, None for AWS; a profile may name one too."""

    def client(endpoint_url: str | None) -> "S3Client":
        return session.client(
            "s3",
            region_name=region,
            endpoint_url=endpoint_url,
            config=Config(
                signature_version=UNSIGNED if options.anonymous else None,
                s3={"addressing_style": "path" if endpoint_url else "auto"},
                connect_timeout=_CONNECT_TIMEOUT_S,
                read_timeout=_STALL_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": _MAX_RETRIES},
                request_checksum_calculation="when_required",
                max_pool_connections=32,
            ),
        )

    if options.endpoint_url is not None:
        return client(options.endpoint_url), options.endpoint_url
    plain = client(None)
    host = urlsplit(plain.meta.endpoint_url).hostname or ""
    if host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return plain, None
    check_endpoint(plain.meta.endpoint_url)
    return client(plain.meta.endpoint_url), plain.meta.endpoint_url


def _credentials(session: boto3.Session, bucket: str) -> Boto3CredentialProvider:
    try:
        return Boto3CredentialProvider(session, ttl=_CREDENTIALS_TTL)
    except ValueError as error:
        message = (
            f"no credentials for s3://{bucket}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "AWS_PROFILE or a role, or ask for anonymous access"
        )
        raise UserError(message) from error


def _object_store(
    bucket: str,
    arguments: dict[str, Any],
    *,
    read_timeout_s: int = _WHOLE_TIMEOUT_S,
    timeout_s: int = _WHOLE_TIMEOUT_S,
) -> ObjectStore:
    options: ClientConfig = {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
        "read_timeout": timedelta(seconds=read_timeout_s),
        "timeout": timedelta(seconds=timeout_s),
    }
    bundle = os.environ.get("AWS_CA_BUNDLE")
    if not bundle:
        return ObjectStore(bucket, client_options=options, **arguments)
    try:
        options["root_certificate"] = Path(bundle).read_bytes()
        return ObjectStore(bucket, client_options=options, **arguments)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        message = f"AWS_CA_BUNDLE={bundle}: no certificates can be read there: {reason}"
        raise UserError(message) from error


def _retries() -> "RetryConfig":
    return {
        "max_retries": _MAX_RETRIES,
        "retry_timeout": timedelta(seconds=_RETRY_TIMEOUT_S),
        "backoff": {"max_backoff": timedelta(seconds=_MAX_BACKOFF_S)},
    }


def no_bucket(bucket: str) -> str:
    """The line that says that the bucket does not exist."""
    return f"there is no bucket {bucket!r} at this endpoint"


def translate(url: str, bucket: str, error: Exception) -> StorageError:
    """Our exception for one of obstore's or botocore's, with one line and no credential in it."""
    reason = str(error).split("\n\nDebug source")[0]
    code = _code(error, reason)
    # What is no S3 error may repeat our request, session token included.
    reason = _BODY.sub(r"\1", reason)
    if code == "NoSuchBucket":
        return ObjectNotFoundError(f"{url}: {no_bucket(bucket)}")
    if code in _BAD_CREDENTIALS or isinstance(error, NoCredentialsError):
        return CredentialsError(f"{url}: access denied ({code or 'no credentials'})")
    for kind, (types, statuses, text) in _KINDS.items():
        if isinstance(error, types) or _status(error) in statuses:
            return kind(f"{url}: {text}" + (f" ({code})" if code else ""))
    if "redirect without LOCATION" in reason or code == "PermanentRedirect":
        return StorageError(f"{url}: the bucket is in another region, set the region")
    line = f"the store answers {code}" if code else " ".join(reason.split())
    lasting = 400 <= _status(error) < 500 and code not in _TRANSIENT
    return (StorageError if lasting else StoreUnavailableError)(
        f"{url}: {line[:_MAX_REASON_CHARS]}"
    )


def _code(error: Exception, reason: str) -> str:
    if isinstance(error, ClientError):
        return error.response.get("Error", {}).get("Code", "")
    found = _CODE.search(reason)
    return found[1] if found else ""


def _status(error: Exception) -> int:
    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    found = _STATUS.search(str(error))
    return int(found[1]) if found else 0
