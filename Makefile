# One command each: setup, test, test-slow, test-extras, faults, check, demo, docs, families. All of them set up first
# where that is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
WORKERS ?= 2
PYTEST_FLAGS ?=

export OMP_NUM_THREADS ?= 1
# Hundreds of processes start in the tests: each would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

# The extras that users may install; `[dev]` and `[docs]` are ours.
EXTRAS := cluster,figures,lm-eval,meteor,mlflow,privacy,quantized,sentencepiece,sites,wandb
EXTRAS_READY := $(VENV)/.extras-ready

.PHONY: setup test test-slow faults test-extras check format demo docs families clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fedloom needs Python 3.11 or newer: make PYTHON=python3.11 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

test: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow and not extra" $(PYTEST_FLAGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) -m "slow and not extra" $(PYTEST_FLAGS)

$(EXTRAS_READY): $(READY)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev,$(EXTRAS)]'
	touch $@

test-extras: $(EXTRAS_READY)
	FEDLOOM_EXTRAS=1 $(BIN)/python -m pytest -m extra $(PYTEST_FLAGS)

# FAULTS=0.1 tries a seeded tenth; STAGES="kills inputs" some of it.
faults: $(READY)
	PYTHONPATH=tests $(BIN)/python -m faults $(STAGES)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(READY)
	$(BIN)/fedloom demo

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(DOCS_READY)
	$(BIN)/mkdocs build --strict

# The page of the families of decoders: every kind that the installed transformers knows, ten minutes.
families: $(READY)
	$(BIN)/python scripts/families --workers $(WORKERS)

clean:
	rm -rf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
