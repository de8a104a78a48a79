PYTHON ?= python3.11
VENV := .venv
# Processes that share the tests.
WORKERS ?= 2
INSTALLED := $(VENV)/.installed

.PHONY: help quickstart install test test-fast test-slow test-slurm mutate lint clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: install  ## corpus, training and context report on this machine, in minutes
	$(VENV)/bin/diptych quickstart

test: lint test-fast  ## lint, types, and the fast tests

test-fast: install
	$(VENV)/bin/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-slow: install  ## the tests that take longer: whole runs, kills, resumes
	$(VENV)/bin/python -m pytest -m "slow and not slurm" -n $(WORKERS) --dist worksteal --durations=20

test-slurm: install  ## jobs on a Slurm cluster that is made of this machine, where Slurm is installed
	$(VENV)/bin/python -m pytest -m slurm --durations=20

mutate: install  ## change N=20 things in ROOM=pretrain/data/stream, one at a time: what does no test notice?
	$(VENV)/bin/python -m tests.mutate $(ROOM) --number $(or $(N),20) --seed $(or $(SEED),0)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV)
