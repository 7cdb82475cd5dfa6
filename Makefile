# `make demo` and `make test` do everything, from a bare checkout; see README.md.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
UV_LOCK := .venv/uv.lock

# Tests start hundreds of processes, which need not compile our files anew each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test check format chaos audit lock schema clean

setup: $(STAMP)

# pip brings only uv, by the hash in the one lock file; uv brings everything else from it.
$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@awk '/^uv==/ {on = 1} on && /^[^ ]/ && !/^uv==/ {exit} on' requirements.lock > $(UV_LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r $(UV_LOCK)
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --require-hashes --compile-bytecode requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	$(BIN)/segformer3d demo

# What starts Ray wants the machine to itself; the rest goes by files, three at a time, since two wait
# too often to keep two cores busy.
test: setup
	$(BIN)/python -m pytest -m "not ray and not slow and not gpu" -n 3 --dist loadfile --no-loadscope-reorder \
		--durations 10
	$(BIN)/python -m pytest tests/integration -m "ray and not slow and not gpu" --durations 10

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/audit.py bandit

# The proofs of docs/reliability.md, fast ones first, then the slow suite: many kills, long runs, as
# many as CHAOS_MINUTES (100) allows; prints the document's table with its figures.
chaos: setup
	$(BIN)/python -m tests.chaos

# bandit over the source, pip-audit over the lock file; fails too if its database is not reached.
audit: setup
	$(BIN)/python .ci/audit.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Renew every pin; no index address goes into the file.
lock: setup
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev --extra train \
		--generate-hashes --no-emit-index-url --no-header pyproject.toml --output-file requirements.lock

# The JSON schema of a job file, for editors.
schema: setup
	$(BIN)/python -m jobs.schema

clean:
	rm -rf .venv demo dist
