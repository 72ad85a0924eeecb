# `make help` lists the targets.
CHECK := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do $$p -c '$(CHECK)' 2>/dev/null && echo $$p && break; done)
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train test test-all test-newest paper lint format types bench docker clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv with the pinned requirements (Python 3.11 to 3.13; PYTHON=... picks one)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(CHECK)' || { echo "Python 3.11 to 3.13 is needed; name one with PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev,dense,parquet,export]'
	touch $(STAMP)

train: setup ## train BiFormer on the embedded digits (about two minutes on two cores)
	$(BIN)/python train.py

test: setup ## run the tests
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: setup ## run the tests, with every size of every net
	$(BIN)/python -m pytest -n 2

test-newest: ## run the tests with the newest version of everything, in .venv-newest
	$(MAKE) VENV=.venv-newest CONSTRAINTS=constraints-newest.txt test

paper: setup ## BiFormer's table, the paper's figures beside ours
	$(BIN)/python scripts/reproduce.py paper=biformer

lint: setup ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup ## put the code into its form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## speed and memory relative to named peers
	$(BIN)/python scripts/benchmark_ops.py
	$(BIN)/python scripts/benchmark_heads.py
	$(BIN)/python scripts/benchmark_pipeline.py
	$(BIN)/python scripts/benchmark_trainer.py
	$(BIN)/python scripts/benchmark_models.py 'models=[biformer_tiny,swin_tiny,resnet50]'

docker: ## build the image `retinue`
	docker build -t retinue .

clean: ## remove .venv, .venv-newest and caches; outputs stay
	rm -rf .venv .venv-newest .pytest_cache .ruff_cache *.egg-info
