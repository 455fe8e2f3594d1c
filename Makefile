# make demo     train a small network with the hook and choose the length of its average afterwards
# make test     lint, type check and test
# make bench    the measurements that the guides quote
# make torture  every experiment on the guarantees of snapshots and outputs, whole
# make coverage the tests with branch coverage, which takes half as long again
# make audit    known security holes in what is installed; asks a database on the network
#
# Needs Python >= 3.10 with venv; the rest goes into .venv, made once and again when the requirements change.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JOBS ?= auto

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit coverage bench torture audit clean

help:
	@sed -n 's/^# //p' Makefile

$(READY): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" "$(TORCH)"
	@touch $(READY)

demo: $(READY)
	$(BIN)/ema demo --out ema-demo --force

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy --strict posthoc_cli

# One thread a process: the tests' tensors are small, and each core has a process of its own.
unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --max-worker-restart 0

coverage: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --max-worker-restart 0 --cov --cov-report=term

bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[bench]" "$(TORCH)"
	$(BIN)/python scripts/compare_peers.py
	$(BIN)/python scripts/bench_fidelity.py
	$(BIN)/python scripts/bench_fidelity.py --corners
	$(BIN)/python scripts/bench_synthesis.py
	$(BIN)/python scripts/bench_averages.py
	$(BIN)/python scripts/bench_differentiable.py
	$(BIN)/python scripts/bench_update.py
	$(BIN)/python scripts/bench_update.py --busy
	$(BIN)/python scripts/bench_planning.py
	$(BIN)/python scripts/bench_load.py
	$(BIN)/python scripts/bench_sweep.py

torture: $(READY)
	$(BIN)/python scripts/torture.py

audit: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --skip-editable

clean:
	rm -rf $(VENV) ema-demo build dist .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis
