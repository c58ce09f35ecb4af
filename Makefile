# Two commands do all the set-up on a fresh machine with Python 3.11+:
#   make demo   installs the core into .venv, trains on the bundled digits for three minutes, samples, judges
#   make test   installs the rest and runs every test
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINUTES ?= 3
JOBS ?= 2
DEMO_RUN := runs/mnist
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: demo test check docs clean
.DELETE_ON_ERROR:

# torch first and alone: with it in place, nothing below pulls another build of it.
$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "smalti needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch==2.13.0
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --constraint constraints.txt --no-deps torch-fidelity  # else it pulls torchvision
	touch $@

# A run that is there is gone on with, so a second `make demo` does not train again.
demo: $(VENV)/.core
	$(BIN)/smalti train mnist --minutes $(MINUTES) --out $(DEMO_RUN) --resume
	$(BIN)/smalti eval $(DEMO_RUN)
	@echo "the digits it draws: $(DEMO_RUN)/samples.png"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m 'not slow and not alone'
	$(BIN)/pytest -m 'alone and not slow'

# Files of tests share the cores, JOBS at a time; those that wait for processes by the clock come afterwards.
test: $(VENV)/.dev
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m 'not alone'
	$(BIN)/pytest -m alone

docs: $(VENV)/.dev
	$(BIN)/pdoc --output-directory build/docs smalti
	@echo "build/docs/index.html; the guides are in docs/"

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
