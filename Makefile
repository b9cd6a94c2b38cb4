# Each target is one command from a fresh clone: what it needs (.venv, pinned packages, the build) is made first.
PYTHON ?= python3
CXX ?= g++
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.cuh csrc/cuda/*.h)
FORMATTED := $(VENV)/bin/clang-format --style=file $(CSRC) $(wildcard tests/emulator/*.cpp tests/emulator/*.h benchmarks/ladder/*.cu benchmarks/ladder/*.h tests/fake_cudart/*)

.PHONY: setup build demo test test-all lint format sanitize gates gpu bench bench-check docs examples wheel clean

demo: $(VENV)/.installed
	$(VENV)/bin/fastattn demo

test: setup
	$(PY) -m pytest -m "not slow and not gpu"

test-all: setup
	$(PY) -m pytest -m "not gpu"

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(FORMATTED) --dry-run --Werror
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(FORMATTED) -i

# Every suite on the device at hand: half an hour on a CPU. BENCH="--quick" takes a minute.
bench: $(VENV)/.installed
	$(PY) -m benchmarks $(BENCH)

# docs/api.md, from the docstrings.
docs: setup
	$(PY) docs/make_api.py

examples: setup
	set -e; for example in examples/*.py; do echo "== $$example"; $(PY) $$example; done

# Ratios to PyTorch against the committed ones for this kind of machine. Under a minute.
bench-check: $(VENV)/.installed
	$(PY) -m benchmarks check

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer; Python isn't instrumented, so their runtime is preloaded.
SANITIZED := build/sanitize
sanitize: setup
	FASTATTN_SANITIZE=address,undefined $(PY) setup.py --quiet build_ext --build-temp $(SANITIZED) --build-lib $(SANITIZED)
	FASTATTN_LIBRARY=$(SANITIZED)/fastattn/_C.abi3.so ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(PY) -m pytest -m "not slow and not gpu" --backend cpu $(wildcard tests/test_attention*.py tests/test_cpu_*.py $(addprefix tests/test_,decode.py linear.py losses.py products.py))

# What ptxas and the machine code say of the CUDA and Triton kernels, for every architecture. Needs nvcc for the former, no GPU.
gates: setup
	$(PIP) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(PY) tests/gates.py
	$(PY) tests/triton_gates.py

# All that takes a GPU: needs torch with CUDA, nvcc and g++, and no network; of .venv if there is one, of PYTHON else.
# PART=build|calibrate|test|triton|sanitize|bench does only that; what passed before is not done again, but with AGAIN=1.
gpu:
	PYTHONPATH=.:tests $(or $(filter-out python3,$(PYTHON)),$(wildcard $(PY)),python3) -m gpu $(PART) \
	  $(if $(AGAIN),--again) $(if $(RESULTS),--results $(RESULTS))

setup: $(VENV)/.installed $(VENV)/.tools

$(VENV)/.dependencies: constraints.txt
	@command -v $(CXX) >/dev/null || { \
	  echo "fastattn needs a C++17 compiler and found no $(CXX): install g++ (Debian, Ubuntu: apt install g++) or set CXX."; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 13) or sys.exit("fastattn is tested on Python 3.10 to 3.13, this is %d.%d: set PYTHON." % v)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip torch numpy setuptools ninja
	@touch $@

$(VENV)/.installed: $(VENV)/.dependencies pyproject.toml setup.py csrc/cuda/nvcc.py $(CSRC)
	$(PIP) --no-build-isolation --editable '.[train,bench]'
	@touch $@

$(VENV)/.tools: $(VENV)/.dependencies pyproject.toml # what tests and checks need besides: the demo does without
	$(PIP) --group dev
	@touch $@

build: $(VENV)/.dependencies # incremental, for working on csrc/
	flock build.lock $(PY) setup.py --quiet build_ext --inplace

# dist/fastattn-…-cp310-abi3-….whl: one for every Python from 3.10 and every torch from 2.11 on. FASTATTN_CUDA=1 has the CUDA kernels in it.
wheel: $(VENV)/.dependencies
	$(PY) -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist build.lock $(VENV) fastattn/_C*.so fastattn/_cuda*.so *.egg-info
