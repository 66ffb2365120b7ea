# `make demo` and `make test` do everything on a fresh machine: they create .venv, install, and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-all test-network lint bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(INSTALLED)  ## probe the bundled digits, then pretrain on them, from command to figure; no download
	$(BIN)/python -m experiments.cifar10_probe --data digits --weights random:dino_vitt8 --image-size 64 --epochs 20 --out runs/demo
	$(BIN)/python -m experiments.demo --out runs/demo-dino

test: $(INSTALLED) lint  ## every test that needs no network and a few minutes
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'not network and not slow'

test-all: $(INSTALLED) lint  ## also the slow tests
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'not network'

test-network: $(INSTALLED)  ## also the official checkpoints, downloaded
	$(BIN)/python -m pytest -m network

lint: $(INSTALLED)  ## ruff, format and rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

bench: $(INSTALLED)  ## the speed tables of the README, ours beside PyTorch
	$(BIN)/python -m benchmarks.features
	$(BIN)/python -m benchmarks.probes
	$(BIN)/python -m benchmarks.dino_step
	$(BIN)/python -m benchmarks.finetune

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache
