# make setup | test [JOBS=2] | demo [SIZE=quick] | kernels-check | emulate | lint | clean      PYTHON=python3.12 chooses the interpreter
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup test demo kernels-check emulate lint clean

SIZE ?= full
JOBS ?= 2
TABLE := tests/data/kernels_table.json
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
	@echo "make test    setup, kernels-check, then the tests, JOBS=2 at a time"
	@echo "make kernels-check  compile every Triton kernel for sm_80, sm_90, sm_100; see build/kernels.txt"
	@echo "make demo    setup, then the demonstration on synthetic video (SIZE=quick: at most 3 minutes)"
	@echo "make emulate tests of the operators with AVX-512 emulated, for processors without it (needs SIMDe)"
	@echo "make lint    ruff"
	@echo "make clean   remove what was built (not .venv, not runs)"

setup: $(STAMP)

# Torch and DALI come first, as the native build and DeepSpeed's own set-up use what is installed (hence no isolation).
$(STAMP): setup.py kernels/native.py pyproject.toml constraints.txt $(NATIVE)
	@command -v $${CXX:-g++} > /dev/null || { echo "mvd-fast needs a C++ compiler: install g++ (Debian: apt install g++)"; exit 1; }
	$(call step,create .venv,$(create_venv))
	$(call step,install build tools and torch,$(PIP) setuptools wheel ninja pybind11 torch)
	$(call step,install DALI and CUDA headers,$(PIP) nvidia-dali-cuda130 nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl)
	$(call step,install DeepSpeed,$(PIP) --no-build-isolation deepspeed)
	$(call step,build mvd-fast and install it with the rest,$(PIP) --no-build-isolation -e '.[bench$(comma)demo$(comma)test]')
	$(call step,compile DeepSpeed's communication between CPU ranks,$(BIN)/python -m mvd_fast.training.deepspeed_start)
	@touch $@

test: setup kernels-check
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

kernels-check: setup
	$(call step,compile the Triton kernels for GPUs and check what they need,mkdir -p build && $(BIN)/python -m mvd_kernels.offline $(TABLE) > build/kernels.txt)

demo: setup
	@$(BIN)/mvd-fast demo --size $(SIZE)

# On processors without AVX-512 its code is tested in an emulation (Debian: apt install libsimde-dev).
OPERATORS := attention linear_smooth_l1 embed_visible_tubes scatter_mask_tokens add_layer_norm linear_8bit
EMULATED := build/emulated
emulate: setup
	@test -e /usr/include/simde/x86/avx512.h || { echo "make emulate needs SIMDe (Debian: apt install libsimde-dev)"; exit 1; }
	$(call step,build the operators with AVX-512 emulated,MVD_EMULATE_AVX512=1 $(BIN)/python setup.py -q build \
	  --build-base build/emulation --build-lib $(EMULATED))
	@PYTHONPATH=$(EMULATED) $(BIN)/python -m pytest -k avx512 $(addsuffix .py,$(addprefix tests/test_,$(OPERATORS)))

lint: setup
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	@rm -rf build dist *.egg-info kernels/build kernels/dist kernels/*.egg-info .pytest_cache .ruff_cache $(STAMP)
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
