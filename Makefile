# The two commands of a newcomer: `make demo` and `make test`. Both create .venv and install when that is needed.
#   make PYTHON=/path/to/python3.11       another interpreter
#   make TORCH="torch==2.12.1"            another torch: constraints.txt no longer pins it; remembered in .venv/torch
#   make TORCH=skip                       torch is there already: in .venv, or in the interpreter's own site-packages
#   make test PYTEST_ARGS="-k blend -x"   more arguments for pytest, or ARGS=... for demo and bench
PYTHON ?= python3.11
TORCH ?= $(or $(shell cat .venv/torch 2>/dev/null),torch==2.13.0)
DEEPSPEED ?= deepspeed==0.19.8
MEGATRON ?= megatron-core==0.16.1
DEMO_CONFIG ?= configs/search/demo.yaml
PYTEST_ARGS ?=
ARGS ?=

BIN := .venv/bin
STAMP := .venv/installed
SOURCES := setup.py constraints.txt $(wildcard megatron_lite/data/csrc/*)
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-input -c .venv/constraints.txt

.PHONY: help install demo test test-slow test-gpu check bench clean
help:
	@echo "make demo | test | test-slow | test-gpu | check | bench | install | clean      (see the top of the Makefile)"

install: $(STAMP)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: no Python 3.11 or newer at '$(PYTHON)'; install it, or: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(if $(filter skip,$(TORCH)),--system-site-packages) .venv || { rm -f $@; exit 1; }

# torch comes first and alone: DeepSpeed's setup imports it, and no build may pull another one (hence no build isolation).
$(STAMP): .venv/bin/python $(SOURCES)
	@$(if $(filter torch==2.13.0,$(TORCH)),cp constraints.txt .venv/constraints.txt,grep -v '^torch==' constraints.txt > .venv/constraints.txt)
	@echo "$(TORCH)" > .venv/torch
	@echo "install: build tools" $(if $(filter skip,$(TORCH)),"(torch is yours)","and $(TORCH)")
	@$(PIP) setuptools wheel numpy $(if $(filter skip,$(TORCH)),,$(TORCH))
	@$(BIN)/python -c 'import torch; print("install: torch", torch.__version__)' || \
		{ echo "error: $(BIN)/python cannot import torch; TORCH=skip expects it there (make TORCH=skip PYTHON=...)" >&2; exit 1; }
	@echo "install: megatron_lite, its C++ core and its dependencies"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@ls megatron_lite/data/_native*.so >/dev/null 2>&1 || echo "install: the C++ core did not build; numpy does its work, slower"
	@echo "install: $(DEEPSPEED)"
	@$(PIP) --no-build-isolation $(DEEPSPEED) >.venv/deepspeed.log 2>&1 || \
		echo "install: DeepSpeed did not build (see .venv/deepspeed.log); going on without it: its tests are skipped"
	@echo "install: $(MEGATRON)"
	@$(PIP) --no-deps --only-binary :all: $(MEGATRON) >.venv/megatron.log 2>&1 || \
		echo "install: no wheel of megatron-core here (see .venv/megatron.log); going on without it: comparisons with it are skipped"
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m regmix_search.run --config $(DEMO_CONFIG) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow $(PYTEST_ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	@if [ -f benchmarks/__main__.py ]; then $(BIN)/python -m benchmarks $(ARGS); \
	else echo "bench: no runner yet; in benchmarks/:" $$(ls benchmarks 2>/dev/null || echo nothing); fi

# What can be made again. .venv and runs/ stay; without its compiled core the package is installed anew by the next make.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis $(STAMP)
	find megatron_lite data_tools regmix_search launch tests \( -name __pycache__ -o -name '*.so' \) -prune -exec rm -rf {} +
