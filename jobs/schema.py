"""The JSON schema of a job file, as it ships beside the templates; run to renew it."""

import json
from importlib.resources import files
from pathlib import Path

from jobs.spec import JobSpec

_NAME = "job.schema.json"


def schema_text() -> str:
    """The schema as it should stand in ``configs/jobs``."""
    schema = JobSpec.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return json.dumps(schema, indent=2) + "\n"


def schema_path() -> Path:
    """Where it stands."""
    return Path(str(files("configs"))) / "jobs" / _NAME


if __name__ == "__main__":
    schema_path().write_text(schema_text(), encoding="utf-8")
