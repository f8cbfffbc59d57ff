# `make test` is what CI runs. Everything happens in .venv, which `make install` builds and keeps up to date.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))
SOURCES := specgen $(wildcard plugins)
# The parts of `make test`: those that need one core each, side by side, then those that take all, in order.
QUICK_PARTS := lint types kernels
PARTS := unit newest
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: help install demo test test-all lint format types kernels unit newest test-oldest bench bench-gpu soak clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

install: $(STAMP) ## make .venv with specgen, its plugins and all that development needs

# torch first and alone: its constraint picks a plain build of that version, before another package's range can ask
# for a newer one that brings CUDA along. The stamp is older than what it depends on: pip runs again.
$(STAMP): pyproject.toml constraints.txt $(PLUGINS:=/pyproject.toml)
	@echo "==> install: virtual environment"
	@test -x $(BIN)/python || { \
	  for python in python3.11 python3; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      exec $$python -m venv $(VENV); fi; \
	  done; echo "FAILED: install: no Python 3.11 or newer found" >&2; exit 1; }
	@echo "==> install: torch"
	@$(PIP_INSTALL) torch
	@echo "==> install: specgen $(notdir $(PLUGINS))"
	@$(PIP_INSTALL) -e '.[dev]' $(addprefix -e ,$(PLUGINS))
	@touch $@

demo: install ## fetch the demo model (93 MB, once) and run examples/demo.py
	@$(BIN)/specgen demo-model
	@$(BIN)/python examples/demo.py

test: install ## lint, types, all tests but the slow ones, and the newest releases of the dependencies
	@failed=; $(MAKE) --jobs=3 --keep-going --output-sync=target $(QUICK_PARTS) || failed=" $(QUICK_PARTS)"; \
	for part in $(PARTS); do \
	  echo "==> $$part"; $(MAKE) $$part || failed="$$failed $$part"; \
	done; \
	if [ -n "$$failed" ]; then echo "==> FAILED:$$failed (each runs alone as 'make <part>')" >&2; exit 1; fi; \
	echo "==> passed: $(QUICK_PARTS) $(PARTS)"

test-all: ## the same with the slow tests
	@$(MAKE) test PYTEST_ARGS= KERNELS_ARGS=

lint: install ## ruff, rules and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: install ## let ruff put things in order
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: install ## mypy --strict, of the package, its plugins and the public API as users write it
	@$(BIN)/mypy $(SOURCES) tests/typing/public_api.py

KERNELS_ARGS = --quick
kernels: install ## compile the GPU kernels for every target and look at what they became; needs no GPU
	@$(BIN)/python -m benchmarks.gpu.compiled $(KERNELS_ARGS)

PYTEST_ARGS = -m "not slow"
# A worker per core, up to four, a file of tests at a time, the longest first (tests/conftest.py). Threads that wait leave the core to the other worker.
WORKERS = --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
unit: install ## pytest without the slow tests
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(WORKERS) --durations=10 $(PYTEST_ARGS)

# RELEASES_ARGS=--required fails where pip reaches no registry; a developer without a network goes on.
RELEASES_ARGS =
newest: install ## a third of the models, README and drop-in on the newest dependencies, in .venv-newest
	@$(BIN)/python -m tests.releases.environment newest $(RELEASES_ARGS)

test-oldest: install ## the same on the lowest that pyproject.toml allows, in .venv-oldest
	@$(BIN)/python -m tests.releases.environment oldest $(RELEASES_ARGS)

bench: install ## tokens per second with and without drafting
	@$(BIN)/python -m benchmarks.decode

SOAK_SECONDS = 600
soak: install ## ten minutes of a server under 32 clients, of whom a fifth leave early
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.soak $(SOAK_SECONDS) 2>/dev/null

bench-gpu: install ## on a GPU: the kernels' tests, then their speed and that of decoding; writes bench-gpu.json and .png
	@$(BIN)/python -m benchmarks.gpu.speed --json bench-gpu.json

clean: ## delete caches and build outputs; .venv stays
	@rm -rf .mypy_cache .pytest_cache .ruff_cache build dist
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
