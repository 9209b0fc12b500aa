# Needs make and Python 3.11 or newer; everything else goes into .venv. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PACKAGES := -p qat2int8.ir -p qat2int8.passes -p qat2int8.pipelines -p qat2int8.tools
PYTEST := $(BIN)/pytest -n auto --maxprocesses 8

.PHONY: help venv test quick lowest demo lint format types package bench clean

help:
	@echo "make venv     create .venv and install the project with its tools"
	@echo "make demo     convert the model that comes along, compare and time it; a report in demo/"
	@echo "make quick    the tests that take seconds"
	@echo "make test     all tests"
	@echo "make lowest   all tests on the lowest versions of the dependencies, in .venv-lowest"
	@echo "make lint     ruff: rules and layout        make format   put it right"
	@echo "make types    mypy, strict"
	@echo "make package  wheel and sdist in dist/"
	@echo "make bench    the measurements of docs/benchmarks.md, most of an hour of an idle machine"
	@echo "make clean    remove what make made"

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "'$(PYTHON)' not found; name a Python 3.11 or newer: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$$($(PYTHON) --version) is too old, qat2int8 needs 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	@echo "installing into .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

test: venv
	@$(PYTEST)

quick: venv
	@$(PYTEST) -m "not slow"

lowest: venv
	@$(BIN)/python -m venv --clear .venv-lowest
	@$(BIN)/python tests/packaging/lowest.py >.venv-lowest/requirements.txt
	@.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
		--requirement .venv-lowest/requirements.txt --editable . pytest pytest-xdist hypothesis
	@.venv-lowest/bin/pytest -n auto --maxprocesses 8 --ignore tests/packaging

demo: venv
	@$(BIN)/qat2int8 demo --output demo

lint: venv
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --diff . ; exit 1; }

format: venv
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

# Never -p qat2int8 alone: mypy would check one file and report success.
types: venv
	@$(BIN)/mypy $(PACKAGES)
	@MYPYPATH=benchmarks $(BIN)/mypy benchmarks/*.py

package: venv
	@$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	@ls dist

bench: venv
	@$(BIN)/python benchmarks/speed.py --write
	@$(BIN)/python benchmarks/convert_time.py --write
	@$(BIN)/python benchmarks/eight_networks.py --write
	@$(BIN)/python benchmarks/evaluation_overhead.py --write

clean:
	@rm -rf .venv .venv-lowest build demo dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
