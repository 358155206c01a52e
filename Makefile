# `make train` and `make test` set up everything they need on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
LOWEST ?= .venv-lowest
DEEPSPEED ?= .venv-deepspeed
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help train test test-lowest test-deepspeed lint docs bench clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	@touch $@

train: $(STAMP) ## Train a small network with SMOOT on scikit-learn's digits (ten seconds, and set-up the first time)
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no recipes/train_digits.py

test: $(STAMP) ## Run the tests
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile

test-lowest: ## Run the tests against the lowest supported versions, in an environment of its own
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[dev]'
	$(LOWEST)/bin/python -m pytest -m "not slow" -n auto --dist loadfile

test-deepspeed: ## Run the tests of DeepSpeed on two processes, in an environment of its own; needs a C++ compiler
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(DEEPSPEED)/bin/uv pip install --quiet --python $(DEEPSPEED)/bin/python --editable '.[dev,deepspeed]'
	PATH="$(CURDIR)/$(DEEPSPEED)/bin:$$PATH" python -m pytest -m slow tests/training/test_deepspeed.py

lint: $(STAMP) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## Build the documentation into site/; a broken link or reference fails the build
	PATH="$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP) ## Measure the cost of a training step of each method
	$(BIN)/python recipes/benchmarks/training_step.py

clean: ## Remove the environment and everything the recipes wrote
	rm -rf $(VENV) $(LOWEST) $(DEEPSPEED) runs site .mypy_cache .pytest_cache .ruff_cache .hypothesis
