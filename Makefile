# Every command works in the project's own .venv. `make help` lists them.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-lowest test-slow test-gpu test-stress test-slurm bench check wheel clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: .venv/installed ## install, then train and test on the embedded data set (no download)
	$(BIN)/python -m lit_cifar.fit --dataset shapes

test: .venv/installed-dev ## install, then run the tests
	$(BIN)/python -m pytest -m "not slow and not gpu and not slurm" --numprocesses auto --maxprocesses 8

PYTHON_LOWEST ?= python3.11
.venv-lowest/installed: pyproject.toml tests/lowest.txt
	$(PYTHON_LOWEST) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint tests/lowest.txt --editable '.[test]'
	@touch $@

test-lowest: .venv-lowest/installed ## run the tests with the oldest versions that pyproject.toml allows
	.venv-lowest/bin/python -m pytest -m "not slow and not gpu and not slurm" --numprocesses auto --maxprocesses 8

test-slow: .venv/installed-dev ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/installed-dev ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

KILLS ?= 20
test-stress: .venv/installed-dev ## kill training runs, try bad mirrors, full disks, random input; over an hour: KILLS=20
	$(BIN)/python tests/stress/kill.py --kills $(KILLS)
	$(BIN)/python tests/stress/mirrors.py
	$(BIN)/python tests/stress/fuzz.py
	$(BIN)/python tests/stress/scale.py

test-slurm: .venv/installed-dev ## preempt, requeue and break jobs of a Slurm on this machine: LIT_CIFAR_SLURM_UP=SCRIPT
	$(BIN)/python -m pytest -m slurm

DATA_DIR ?= data
bench: .venv/installed-dev ## measure every bar of BENCHMARKS.md, about an hour: DATA_DIR=FOLDER [AIRBENCH94=SCRIPT]
	$(BIN)/python benchmarks/compare.py $(DATA_DIR) $(if $(AIRBENCH94),--airbench94 $(AIRBENCH94))

check: .venv/installed-dev ## check style, types and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

wheel: .venv/installed ## build dist/: the sdist, and of it the wheel
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

clean: ## remove what these commands made, but no runs and no data
	rm -rf .venv .venv-lowest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
