# make lab    open the quickstart in JupyterLab          make test   run everything
# `make help` lists the rest. Needs Python 3.10 to 3.13, a C++20 compiler and make; Node only for widgets.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
BENCHMARKS ?= fork memory tree first-token search gemm spec
# GPU kernels: AUTO builds them when nvcc is there (a GPU isn't needed), ON insists, OFF doesn't.
CUDA ?= AUTO
CUDA_ARCHS ?= 80,90a,100,120

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.dendrite-setup
NATIVE := $(shell find cuda_ext -name '*.cc' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' \
  -o -name '*.cuh' -o -name '*.cmake' -o -name CMakeLists.txt)
NODE_MODULES := widgets/node_modules/.package-lock.json
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.PHONY: help setup lab model test test-python test-widgets browser bench widgets lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(STAMP)  ## make .venv: builds the native modules, installs everything (quick when up to date)
	@:

# Editable: Python comes from the checkout, native modules and GPU kernels are built into .venv and
# rebuilt here when a source changes. Build tools go into .venv first, so that no network is needed
# for a rebuild and CMake's cache stays valid; torch too, for its headers.
$(STAMP): pyproject.toml $(CONSTRAINTS) CMakeLists.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "dendrite-lab needs Python 3.10 to 3.13, $(PYTHON) is $$($(PYTHON) -V 2>&1); try: make setup PYTHON=python3.12" >&2; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "no C++ compiler: install g++ or clang++ (Debian, Ubuntu: apt install g++)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "could not make $(VENV) (Debian, Ubuntu: apt install python3-venv)" >&2; rm -rf $(VENV); exit 1; }
ifdef TORCH_INDEX
	$(PIP) install -c $(CONSTRAINTS) torch --index-url $(TORCH_INDEX)
endif
	$(PIP) install -c $(CONSTRAINTS) scikit-build-core nanobind cmake ninja torch
	SKBUILD_CMAKE_DEFINE='DENDRITE_EMULATOR=ON;DENDRITE_CUDA=$(CUDA);DENDRITE_CUDA_ARCHS=$(CUDA_ARCHS)' \
	  $(PIP) install -c $(CONSTRAINTS) --no-build-isolation -e '.[test,dev]'
	@touch $@

model: setup  ## fetch and convert the default model, once
	$(BIN)/dendrite-lab fetch

lab: setup model  ## open JupyterLab on the quickstart; prints the URL where there is no browser
	$(BIN)/dendrite-lab lab

test: test-python test-widgets  ## run every test: Python, notebooks, browser, widgets

test-python: setup model browser
	$(BIN)/python -m pytest tests notebooks --nbmake --nbmake-timeout=300 $(PYTEST_ARGS)

# The browser test needs Chromium or Chrome. In CI it has to be there; elsewhere the test says that
# it was skipped, and why.
browser:
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core && exit 0; fi; \
	echo "no Chromium or Chrome found: the browser test can't run (install one of them)" >&2; \
	test -z "$$CI"

test-widgets:
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory test-widgets-node; \
	elif [ -n "$$CI" ]; then echo "npm is missing: CI has to test the widgets" >&2; exit 1; \
	else echo "npm is missing: widget tests left out (the built widgets are in the repository)"; fi

.PHONY: test-widgets-node
test-widgets-node: $(NODE_MODULES)
	cd widgets && npm test && npm run check

$(NODE_MODULES): widgets/package.json widgets/package-lock.json
	cd widgets && npm ci --no-audit --no-fund
	@touch $@

widgets: $(NODE_MODULES)  ## rebuild dendrite_lab/static from the TypeScript sources (needs Node)
	cd widgets && npm run build

bench: setup model  ## run the benchmarks into benchmarks/results (BENCHMARKS="fork tree" for some)
	mkdir -p benchmarks/results
	set -e; for name in $(BENCHMARKS); do \
	  $(BIN)/dendrite-lab bench $$name --json benchmarks/results/$$name.json; done
	$(BIN)/python benchmarks/make_report.py

lint: setup  ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## rewrite the Python sources in the house style
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:  ## remove .venv, builds and caches (not the model cache)
	rm -rf $(VENV) build artifacts widgets/node_modules .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
