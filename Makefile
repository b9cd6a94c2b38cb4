# Each target is one command from a fresh clone: it makes .venv, installs the pinned versions and builds first.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CSRC := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h)

.PHONY: setup build demo test test-all lint format sanitize bench clean

setup: $(VENV)/.built

$(VENV)/.deps: constraints.txt pyproject.toml
	@command -v $(CXX) >/dev/null || { echo "fastattn needs a C++17 compiler: install g++ (Debian, Ubuntu: apt install g++) or set CXX"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else f"fastattn needs Python 3.10 to 3.13, this is {v[0]}.{v[1]}; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy setuptools ninja
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt $$($(PY) tools/extras.py train dev)
	@touch $@

$(VENV)/.built: $(VENV)/.deps setup.py $(CSRC)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

build: setup

clean:
	rm -rf build $(VENV) fastattn/_C*.so
