# `make train` and `make test` set up everything they need on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help train test lint bench clean

help: ## List the commands
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	@touch $@

train: $(STAMP) ## Train a small network with SMOOT on scikit-learn's digits (about a minute)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/train_digits.py

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest -m "not slow"

lint: $(STAMP) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP) ## Measure the cost of a training step of each method
	$(BIN)/python recipes/benchmarks/training_step.py

clean: ## Remove the environment and everything the recipes wrote
	rm -rf $(VENV) runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
