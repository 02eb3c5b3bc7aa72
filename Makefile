PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install quickstart test test-all compile-all lint format clean

help: ## Say what each target does
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP) ## Make .venv/ with everything that the other targets need

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

quickstart: install ## Convert, verify, continue pretraining, export back: the whole walk on a small model (3 minutes)
	$(BIN)/python recipes/quickstart.py

# tests/ops has a process of its own: Triton's interpreter is chosen when the kernels are imported.
test: install ## Run the tests (a quarter of an hour on 2 cores)
	$(BIN)/python -m pytest -m 'not slow and not versions' -n 2 --dist worksteal --ignore tests/ops
	$(BIN)/python -m pytest -m 'not slow and not versions' -n 2 --dist worksteal tests/ops

test-all: install ## Run every test, the long ones and the other versions of transformers included
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/ops
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/ops

compile-all: install ## Compile every variant of every kernel for every supported part (hours)
	$(BIN)/python tests/ops/compile_kernels.py --cover all
	$(BIN)/python tests/ops/compile_kernels.py --cover all --ops layer

lint: install ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Rewrite the files as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment, caches and the quickstart's output
	rm -rf $(VENV) quickstart/ build/ *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
