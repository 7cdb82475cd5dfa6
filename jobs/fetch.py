"""The verb ``weights fetch``: a published SegFormer from the Hugging Face hub, into our format."""

import os
import re
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

from jobs.weights import file_sha256, read_foreign, write_weights
from pipeline.errors import JobError, UserError
from pipeline.web import NoRedirects

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
_STATES = ("model.safetensors", "pytorch_model.bin")
_ANSWER_S = 10.0
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class FetchReport:
    """What was fetched and written.

    Attributes:
        name: On the hub.
        revision: The commit that it was.
        file: The file that held the parameters.
        sha256: Of that file.
        target: Our weights file.
        target_sha256: Of it.
    """

    name: str
    revision: str
    file: str
    sha256: str
    target: str
    target_sha256: str

    def text(self) -> str:
        """For a person."""
        return (
            f"{self.name} {self.file}, revision {self.revision}, sha256 {self.sha256}\n"
            f"{self.target}: sha256 {self.target_sha256}"
        )


def fetch_weights(
    name: str,
    target: str,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    endpoint: str | None = None,
) -> FetchReport:
    """Fetch the files of a SegFormer that an import needs, and import them.

    They stay in the hub's own cache, so that a second fetch needs no network. The hub's
    environment variables hold: HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.

    Args:
        name: On the hub, as in ``nvidia/segformer-b0-finetuned-cityscapes-1024-1024``.
        target: Our weights file, to be written.
        revision: Branch, tag or commit; the newest by default.
        sha256: What the file with the parameters must have.
        endpoint: The hub's URL; HF_ENDPOINT by default.

    Raises:
        UserError: The hub has no such name, revision or SegFormer, or the target is no good.
        JobError: The hub cannot be reached, or the parameters are not those that were asked for.
    """
    wanted = None if sha256 is None else sha256.strip().lower()
    if wanted is not None and not re.fullmatch(r"[0-9a-f]{64}", wanted):
        message = f"--sha256 {sha256}: 64 hexadecimal digits are needed"
        raise UserError(message)
    if not _NAME.fullmatch(name):
        message = f"{name}: no name on the hub, which are written OWNER/MODEL"
        raise UserError(message)
    folder, state = _download(name, revision, endpoint)
    found = file_sha256(folder / state)
    if wanted not in (None, found):
        message = f"{name} {state}: its sha256 is {found}, not {wanted}: nothing was written"
        raise JobError(message)
    model, info = read_foreign(folder, shown=f"{name} on the hub")
    info = replace(info, training_data=f"as published on the hub as {name}, {folder.name}")
    write_weights(target, model, info)
    return FetchReport(name, folder.name, state, found, target, file_sha256(target))


def _download(name: str, revision: str | None, endpoint: str | None) -> tuple[Path, str]:
    """Bring the files into the hub's cache; the folder of their commit, and the parameters' name.

    All are of the commit that the first was of, whatever happens on the hub meanwhile.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        from huggingface_hub import constants, errors
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        message = "weights fetch needs the package huggingface-hub: install it"
        raise UserError(message) from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    fetch = _Fetch(name, revision, endpoint or constants.ENDPOINT, errors)
    config = fetch.file(_CONFIG)
    if config is None:
        message = f"{name}: no {_CONFIG} there, so no SegFormer"
        raise UserError(message)
    fetch.revision = config.parent.name
    fetch.file(_PREPROCESSOR)
    for state in _STATES:
        if fetch.file(state) is not None:
            return config.parent, state
    message = f"{name}: neither {' nor '.join(_STATES)} there"
    raise UserError(message)


class _Fetch:
    """Fetches single files of one model."""

    def __init__(self, name: str, revision: str | None, endpoint: str, errors: Any) -> None:
        self.name, self.revision, self.endpoint, self.errors = name, revision, endpoint, errors
        self._trouble = _trouble(endpoint)

    def file(self, file: str) -> Path | None:
        """One file in the cache; None if the model has no such file."""
        from huggingface_hub import (
            _CACHED_NO_EXIST,
            hf_hub_download,
            try_to_load_from_cache,
        )

        errors = self.errors
        try:
            path = hf_hub_download(
                self.name,
                file,
                revision=self.revision,
                endpoint=self.endpoint,
                etag_timeout=_ANSWER_S,
                local_files_only=self._trouble is not None,
            )
        except errors.LocalEntryNotFoundError as error:
            # What the hub once said that it does not have needs no second question.
            if try_to_load_from_cache(self.name, file, revision=self.revision) is _CACHED_NO_EXIST:
                return None
            raise self._unreachable(error) from None
        except errors.RevisionNotFoundError:
            message = f"{self.name}: no revision {self.revision} there"
            raise UserError(message) from None
        except errors.GatedRepoError:
            message = f"{self.name}: its owner asks for consent first: see its page, set HF_TOKEN"
            raise UserError(message) from None
        except (errors.RepositoryNotFoundError, errors.HFValidationError):
            message = f"{self.name}: the hub has no model of that name (private ones need HF_TOKEN)"
            raise UserError(message) from None
        except errors.EntryNotFoundError:
            return None
        except (errors.HTTPError, OSError) as error:
            raise self._unreachable(error) from None
        return Path(path)

    def _unreachable(self, error: BaseException) -> JobError:
        reason = self._trouble or _first_line(error.__cause__ or error)
        files = f"{_CONFIG}, {_PREPROCESSOR} and {_STATES[0]}"
        return JobError(
            f"the hub at {self.endpoint} cannot be reached ({reason[:120]}). By hand: put {files} "
            f"of {self.name} into a folder, then `segformer3d weights import FOLDER TARGET`"
        )


def _trouble(endpoint: str) -> str | None:
    """Why the hub cannot be reached, if so: its library tries for half a minute to find out.

    Its host is the user's choice, and so are proxies, which the library uses too; where it
    redirects to is not asked, that may be a neighbour of ours.
    """
    if not endpoint.startswith(("http://", "https://")):
        return "no http(s) URL"
    request = urllib.request.Request(endpoint, method="HEAD")  # noqa: S310  the user's endpoint
    try:
        with urllib.request.build_opener(NoRedirects).open(request, timeout=_ANSWER_S):
            return None
    except urllib.error.HTTPError:
        return None  # it answered
    except (OSError, ValueError, HTTPException) as error:
        return _first_line(getattr(error, "reason", error))


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
