"""Hashes of what is fixed once a generation is planned, kept in its success marker."""

import hashlib

from jobs.plan import Plan
from pipeline.layout import JOB_KEY, Generation
from pipeline.storage import Store


def fixed_digests(store: Store, generation: Generation, plan: Plan) -> dict[str, str]:
    """Sha256 by key of ``job.json``, ``plan.json`` and the plan's parts.

    Raises:
        StorageError: If one of them cannot be read.
    """
    keys = [JOB_KEY, generation.plan_key, *(part.key for part in plan.parts)]
    return {key: hashlib.sha256(store.read(key)).hexdigest() for key in keys}
