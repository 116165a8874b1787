# make demo: set up .venv and show the whole road. make test: the same set-up with the developers' tools, then lint, types, tests.
# PIP_ARGS passes options to pip, PYTHON names the interpreter.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types tests clean

demo: $(VENV)/.user
	$(BIN)/crdnd demo

test: lint types tests

lint: $(VENV)/.developer
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.developer
	$(BIN)/pyright --pythonpath $(BIN)/python

tests: $(VENV)/.developer
	$(BIN)/pytest -n auto

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "crdnd needs Python 3.11 to 3.13, this is $$($(PYTHON) --version); name another: make demo PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.user: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e .
	touch $@

$(VENV)/.developer: $(VENV)/.user
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
