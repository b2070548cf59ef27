# A new user needs `make demo` and `make test` only. Each creates the environment in .venv that it needs.
PYTHON ?= python3
VENV ?= .venv
# On a Linux machine without a GPU, where pip would install the CUDA build of torch:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt
# One thread per test process: two busy processes with several threads each slow each other down many times over.
# One process per core, at most four. The tests of a file share fixtures, so they stay in one process. Files run in the
# order of their names, in which the longest are not the last.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow lint results docs clean

demo: $(VENV)/.installed
	$(BIN)/rush run digits

test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed-test
	$(PYTEST) -m slow

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check src tests benchmarks examples tools docs/conf.py
	$(BIN)/ruff format --check src tests benchmarks examples tools docs/conf.py
	$(BIN)/mypy

# The tables of README.md, docs/ and results/, from the committed records.
results: $(VENV)/.installed
	PYTHONPATH=benchmarks $(BIN)/python tools/results.py

# The site of the documentation. A broken link is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -d build/doctrees . build/docs
	@echo "documentation: build/docs/index.html"

clean:
	rm -rf $(VENV) runs build

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"rush needs Python 3.11, 3.12 or 3.13, this is {v[0]}.{v[1]}: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(if $(TORCH_INDEX),$(PIP) torch --index-url $(TORCH_INDEX))
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-docs
	$(PIP) -e '.[docs,test]'
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed-test
	$(PIP) -e '.[docs,test,lint]'
	@touch $@
