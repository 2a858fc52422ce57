VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
RUN := $(VENV)/bin/python -m

# The first Python that really runs: a version manager's shim may exist and fail.
# `make setup PYTHON=…` names another one.
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for python in python3.12 python3.11 python3; do \
	$$python -c '$(USABLE)' 2>/dev/null && echo $$python && break; done)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all unit lint gpu bench gpu-bench

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamps lie in the environment and so vanish with it.
setup: $(VENV)/.package  ## create .venv with all of requirements.txt and this package, editable

$(VENV)/.package: setup.py pyproject.toml $(VENV)/.requirements
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(PIP) check
	@touch $@

$(VENV)/.requirements: requirements.txt $(VENV)/pyvenv.cfg
	$(PIP) install --requirement requirements.txt
	@touch $@

$(VENV)/pyvenv.cfg:
	@'$(PYTHON)' -c '$(USABLE)' || { \
	echo 'This needs Python 3.11 or 3.12 with venv, but found "$(PYTHON)".'; \
	echo 'Install one, or name it: make setup PYTHON=/path/to/python3.12'; exit 1; } >&2
	'$(PYTHON)' -m venv $(VENV)

demo: setup  ## train two small models on drawn pictures, test them, show what they see
	$(VENV)/bin/python tools/demo.py

test: lint unit  ## set up, lint, and run the quick tests

test-all: lint  ## lint and run all tests but the GPU's
	$(RUN) pytest -m 'not gpu'

unit: setup
	$(RUN) pytest -m 'not slow and not gpu'

lint: setup  ## ruff: rules and format
	$(RUN) ruff check .
	$(RUN) ruff format --check .

bench: setup  ## time and memory on this CPU, beside DeiT; 9 minutes
	$(RUN) benchmarks.reach --device cpu --minutes 6 --json docs/benchmarks/cpu_reach.json
	$(RUN) benchmarks.backbones --device cpu --models vim-tiny vil-tiny --sizes \
		--recompute 1024 --minutes 2 \
		--json docs/benchmarks/cpu_recompute.json
	$(RUN) benchmarks.backbones --device cpu --models secvit-tiny --sizes \
		--recompute 512 --minutes 2 \
		--json docs/benchmarks/cpu_recompute_secvit.json

# No set-up: a machine with a GPU may bring its own torch and have no network.
ANY_PYTHON := $(firstword $(wildcard $(VENV)/bin/python) python3)

gpu:  ## run the GPU's tests, in .venv if there is one, else with python3
	$(ANY_PYTHON) -m pytest -m gpu

gpu-bench:  ## time and memory on a GPU, beside GPU packages and DeiT; below 10 minutes
	$(ANY_PYTHON) -m benchmarks.reach --device cuda --minutes 4.5 \
		--json docs/benchmarks/gpu_reach.json
	-$(ANY_PYTHON) -m benchmarks.ops --device cuda --minutes 2.5 --json docs/benchmarks/gpu_ops.json
	$(ANY_PYTHON) -m benchmarks.backbones --device cuda --minutes 2 \
		--json docs/benchmarks/gpu_backbones.json
