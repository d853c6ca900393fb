# Everything runs in .venv, which `make setup` builds once and leaves alone until
# pyproject.toml or constraints.txt change. No target needs anything but Python 3.11+.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-done
SHELL  := /bin/bash

.PHONY: setup demo demo-quick test test-all test-interop check docs figures coverage wheel bench web clean

setup: $(STAMP)

# torch first and alone: asked for by another package, pip would take the newest build with its CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "crosslayer needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: setup
	$(BIN)/clt demo

demo-quick: setup
	$(BIN)/clt demo --quick

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: setup
	$(BIN)/pytest -n 2 -m "not slow and not gpu and not interop"

# SAELens and circuit-tracer themselves open what we export. They want older packages: an environment of their own.
INTEROP := .venv-interop
test-interop: setup $(INTEROP)/.setup-done
	$(INTEROP)/bin/python -m pytest -c tests/interop/pytest.ini --rootdir . tests/interop

$(INTEROP)/.setup-done: tests/interop/requirements.txt
	@test -x $(INTEROP)/bin/python || $(PYTHON) -m venv $(INTEROP)
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(INTEROP)/bin/pip install --quiet --disable-pip-version-check -r tests/interop/requirements.txt
	@touch $@

test-all: check
	$(BIN)/pytest

# Every page, link and anchor is checked; the site works from a folder, without a server.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The pictures in docs/images: needs `make demo` before, and Chromium.
figures: setup
	$(BIN)/python docs/figures.py

coverage: setup
	$(BIN)/pytest -n 2 -m "not slow and not gpu" --cov=clt --cov-branch --cov-report=term-missing:skip-covered --cov-report=html

wheel: setup
	$(BIN)/pip wheel --quiet --no-deps -w dist .

bench: setup
	@for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

# The graph page: sources in web/, built files in clt/viz/static/ (committed, so that users need no Node).
web:
	cd web && npm ci && npm run check && npm test && npm run build

clean:
	rm -rf $(VENV) $(INTEROP) build dist
