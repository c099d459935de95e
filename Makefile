# make setup | test | demo [SIZE=quick] | lint | clean      PYTHON=python3.12 chooses the interpreter
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup test demo lint clean

SIZE ?= full
BIN := .venv/bin
STAMP := .venv/.setup-done
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
export PATH := $(CURDIR)/.venv/bin:$(PATH)
NATIVE := $(wildcard csrc/* csrc/dali/*)

# $(call step,what it does,command): one line with the time it took; a failing command stops make.
step = @printf '%-60s\n' "mvd-fast: $(1) ..."; start=$$SECONDS; $(2) || { echo "mvd-fast: that failed: $(1)"; exit 1; }; \
	echo "mvd-fast: ... done in $$((SECONDS - start)) s"

help:
	@echo "make setup   virtual environment, pinned dependencies, native build (a few minutes, 7 GB)"
	@echo "make test    setup, then the tests"
	@echo "make demo    setup, then the demonstration on synthetic video (SIZE=quick: at most 3 minutes)"
	@echo "make lint    ruff"
	@echo "make clean   remove what was built (not .venv, not runs)"

setup: $(STAMP)

# Torch and DALI come first, as the native build and DeepSpeed's own set-up use what is installed (hence no isolation).
$(STAMP): setup.py pyproject.toml constraints.txt $(NATIVE)
	@command -v $${CXX:-g++} > /dev/null || { echo "mvd-fast needs a C++ compiler: install g++ (Debian: apt install g++)"; exit 1; }
	$(call step,create .venv,$(create_venv))
	$(call step,install build tools and torch,$(PIP) setuptools wheel ninja pybind11 torch)
	$(call step,install DALI and CUDA headers,$(PIP) nvidia-dali-cuda130 nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl)
	$(call step,install DeepSpeed,$(PIP) --no-build-isolation deepspeed)
	$(call step,build mvd-fast and install it with the rest,$(PIP) --no-build-isolation -e '.[demo$(comma)test]')
	@touch $@

test: setup
	@$(BIN)/python -m pytest

demo: setup
	@$(BIN)/mvd-fast demo --size $(SIZE)

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	@rm -rf build dist *.egg-info kernels/*.egg-info .pytest_cache .ruff_cache $(STAMP)
	@rm -f kernels/mvd_kernels/*.so mvd_fast/data/*.so
	@find mvd_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

comma := ,
# The first interpreter that runs and is new enough; a name on PATH may be a stub that does not run.
define create_venv
for python in $(PYTHON) python3.11 python3.12 python3; do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && found=$$python && break; \
	done; \
	test -n "$$found" || { echo "mvd-fast needs Python 3.11 or newer, and found none (PYTHON=/path/to/python names one)"; exit 1; }; \
	test -x $(BIN)/python || $$found -m venv .venv || { \
	  echo "mvd-fast needs Python's venv module: install it (Debian: apt install python3-venv)"; rm -rf .venv; exit 1; }
endef
