# Every target works on a fresh machine: it creates .venv and installs what it needs. `make demo` needs much less than
# `make test`, which compares with PyTorch, transformers and TensorFlow Datasets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.installed-experiments
DEV := $(VENV)/.installed-dev
PYTEST := $(BIN)/python -m pytest --durations=25

# The tests keep compiled programs for the next run: compiling is most of their time. `make clean` removes them.
test test-all test-network: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
test test-all test-network: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.2
test test-all test-network: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= 0

.PHONY: help demo test test-all test-network faults lint docs bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# .installed-EXTRA: the checkout with one extra of pyproject.toml.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -qq --editable '.[$*]'
	touch $@

demo: $(DEMO)  ## two photos and the digits through the model inside the package: a minute, no data to download
	$(BIN)/dinojax demo --out runs/demo
	$(BIN)/dinojax probe digits --weights dinojax_vitt --image-size 32 --epochs 20 --out runs/demo-digits

test: $(DEV) lint docs  ## what CI runs: lint, docs, and every test but the slow ones and those that need the internet
	$(PYTEST) --numprocesses 2 --dist worksteal -m 'not network and not slow'

test-all: $(DEV) lint docs  ## also the slow tests; one of them installs the package from the package index
	$(PYTEST) --numprocesses 2 --dist worksteal -m 'not network'

test-network: $(DEV)  ## only the tests that need the internet: the official checkpoints, downloaded and compared
	$(PYTEST) -m network

faults: $(DEV)  ## 12,000 damaged files of every kind, killed trainings and double starts: half an hour on two cores
	$(BIN)/python -W ignore -m tests.support.faults

lint: $(DEV)  ## format, rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(DEV)  ## the documentation as a site in build/site; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(DEV)  ## the speed tables of the documentation, ours beside PyTorch
	$(BIN)/python -m benchmarks.features
	$(BIN)/python -m benchmarks.probes
	$(BIN)/python -m benchmarks.dino_step
	$(BIN)/python -m benchmarks.finetune
	$(BIN)/python -m benchmarks.dense

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache build
