# `make help` lists what there is. Every target sets up what it needs, from a machine with Python 3.11 and nothing else.

PYTHON ?= python3
BIN := .venv/bin
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test fuzz check lint format bench native pure lock redis cc wrk clean

export DEBIAN_FRONTEND := noninteractive
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore

# $(call need,PACKAGE): install a package of Debian's where we may, else say in one line what to do.
need = if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
    echo "Installing $(1) ..."; { apt-get update -qq || true; }; \
    apt-get install -y -qq --no-install-recommends -o DPkg::Lock::Timeout=120 $(1) >/dev/null; \
  else echo "$(1) is missing: install it (Debian, Ubuntu: sudo apt-get install $(1)) and try again" >&2; exit 1; fi

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.run ## the gateway on port 8080 before seven small stand-in AI services; prints what to try
	@$(BIN)/python -m gateway demo $(ARGS)

test: .venv/.dev redis ## all tests; ARGS="-k breaker" picks some, COVERAGE=1 measures
	@$(BIN)/python -m pytest $(if $(COVERAGE),--cov --cov-report=term) $(ARGS)

fuzz: .venv/.dev ## each fuzzing test for FUZZ_SECONDS (60); ARGS="heads" picks some
	@FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m tests.fuzz $(ARGS)

check: COVERAGE := 1
check: lint test ## formatting, lint, types, tests with coverage: what CI runs

lint: .venv/.dev ## formatting, lint and types alone
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy

format: .venv/.dev ## put the code into our form
	@$(BIN)/python -m ruff check --fix --select I .
	@$(BIN)/python -m ruff format .

bench: .venv/.dev redis wrk ## what a request costs, in here and beside nginx and others; ARGS="latency --rounds 5" picks
	@$(if $(ARGS),,$(BIN)/python -m bench.layers)
	@$(if $(ARGS),,$(BIN)/python -m bench.instructions)
	@$(BIN)/python -m bench $(ARGS)

native: .venv/.dev cc pure ## compile the request's way, in place: a quarter more requests; `make pure` undoes it
	@echo "Compiling, which takes a minute or two ..."
	@HATCH_BUILD_HOOKS_ENABLE=1 $(BIN)/python -m hatchling build --target wheel --hooks-only >build.log 2>&1 || \
	  { cat build.log >&2; exit 1; }
	@rm -f build.log

pure: ## remove what `make native` made
	@rm -rf build build.log *__mypyc.*.so && find gateway -name '*.so' -delete

lock: .venv/.run ## compile requirements/*.txt from pyproject.toml; UPGRADE=1 takes the newest versions
	@$(BIN)/python -c 'import uv' 2>/dev/null || $(BIN)/python -m pip install --quiet 'uv>=0.9'
	@$(COMPILE) --extra qdrant --output-file requirements/base.txt pyproject.toml
	@$(COMPILE) --group build --output-file requirements/build.txt
	@$(COMPILE) --group native --constraint requirements/base.txt --constraint requirements/build.txt \
	  --output-file requirements/native.txt
	@$(COMPILE) --all-extras --group dev --group build --constraint requirements/base.txt \
	  --output-file requirements/dev.txt pyproject.toml

COMPILE = $(BIN)/python -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-config --no-emit-index-url --custom-compile-command 'make lock' $(if $(UPGRADE),--upgrade)

redis:
	@command -v redis-server >/dev/null || { $(call need,redis-server); }

cc: # a compiler, and Python's headers where they belong to a package of their own
	@command -v gcc >/dev/null || { $(call need,gcc libc6-dev); }
	@$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || \
	  { $(call need,python3-dev); }

wrk: # the benchmark goes on without it
	@command -v wrk >/dev/null || [ "$$(id -u)" != 0 ] || { $(call need,wrk); }

clean: pure ## remove .venv and everything else that was made here
	rm -rf .venv build dist bench/out .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian and Ubuntu keep ensurepip, without which a venv has no pip, in a package of its own.
$(BIN)/python:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call need,python3-venv); }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/it" >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv

# What the gateway runs with, the image included: locked, checked by hash, and the package itself, editable.
.venv/.run: pyproject.toml requirements/base.txt requirements/build.txt | $(BIN)/python
	@echo "Installing what the gateway needs into .venv ..."
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements/base.txt -r requirements/build.txt
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# What its tests and checks need besides.
.venv/.dev: requirements/dev.txt .venv/.run
	@echo "Installing what its tests need into .venv ..."
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements/dev.txt
	@touch $@
