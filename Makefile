# make demo     train a small network with the hook and choose the length of its average afterwards
# make test     lint, type check and test
# make bench    the measurements that the guides quote
# make gpu      on a machine with a CUDA device: the tests that need one, and one table of times, in 8 minutes;
#               without `.venv` and a network it runs with PYTHON, whose torch must know the device
# make torture  every experiment on the guarantees of snapshots and outputs, at full count
# make integrations  the heavy tests with training frameworks, in an environment of their own
# make dist     the package's two files in dist/, checked
# make wheel    dist, then the wheel tried in an environment of its own; PYTHON and TORCH choose others
# make compat   the wheel with the oldest Python and torch, and with the newest
#
# Needs Python >= 3.10 with venv; the rest goes into .venv, made once and again when the requirements change.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
READY := $(VENV)/.ready
FRAMEWORKS := $(VENV)-integrations
JOBS ?= auto
# Modules are compiled at their first import, not all of torch's now: this halves the time.
INSTALL := python -m pip install --quiet --disable-pip-version-check --no-compile
# They are compiled once: tests and benchmarks start commands many times.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit bench gpu torture integrations dist wheel compat clean

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

$(INSTALLED): pyproject.toml Makefile
	@echo "installing the package into $(VENV), most of it torch: some minutes, and 1.3 GB with torch's"
	@echo "CPU build, 6 GB with CUDA"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) "$(TORCH)"
	$(BIN)/$(INSTALL) --editable . "$(TORCH)"
	@touch $(INSTALLED)

$(READY): $(INSTALLED)
	@echo "installing what the tests need, too"
	$(BIN)/$(INSTALL) --editable ".[dev]" "$(TORCH)"
	@touch $(READY)

demo: $(INSTALLED)
	$(BIN)/ema demo

# Tests wait for processes and disks at times: the types are checked meanwhile.
test: lint
	$(MAKE) --no-print-directory --jobs 2 types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy --strict posthoc_cli tests/e2e/typed_user.py
	$(BIN)/pyright --pythonpath $(BIN)/python tests/e2e/typed_user.py

# One thread a process: the tests' tensors are small, and each core has a process of its own.
unit: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --max-worker-restart 0

bench: $(READY)
	$(BIN)/python scripts/compare_peers.py
	$(BIN)/python scripts/bench_fidelity.py
	$(BIN)/python scripts/bench_fidelity.py --hard
	$(BIN)/python scripts/bench_synthesis.py
	$(BIN)/python scripts/bench_update.py
	$(BIN)/python scripts/bench_sweep.py
	$(BIN)/python scripts/overfitting.py

# Not `$(READY)`, which needs a network.
gpu:
	$(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON)) scripts/gpu.py

$(FRAMEWORKS)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/$(INSTALL) "$(TORCH)"
	$(FRAMEWORKS)/bin/$(INSTALL) --editable ".[integrations]" "$(TORCH)"
	@touch $@

integrations: $(FRAMEWORKS)/.ready
	EMA_HEAVY=1 OMP_NUM_THREADS=1 $(FRAMEWORKS)/bin/python -m pytest -n $(JOBS) --dist loadgroup tests/integrations

torture: $(READY)
	PYTHONPATH=tests $(BIN)/python -m torture

dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

wheel: dist
	rm -rf $(VENV)-wheel
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/$(INSTALL) "$(TORCH)" dist/*.whl
	cd $(VENV)-wheel && bin/ema guide && bin/ema demo --steps 1000

compat:
	$(MAKE) wheel PYTHON=python3.10 TORCH=torch==2.4.0
	$(MAKE) wheel PYTHON=python3.13

clean:
	rm -rf $(VENV) $(VENV)-wheel $(FRAMEWORKS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
