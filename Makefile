# `make demo` and `make test` need nothing but Python: each makes .venv first.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONHASHSEED = 0

.PHONY: demo test test-all lint bench recipes clean

demo: .venv/ready
	$(BIN)/qkit demo

test: .venv/ready lint
	$(BIN)/python -m pytest

test-all: test
	$(BIN)/qkit parity --all

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/parity.py

recipes: .venv/ready
	$(BIN)/python recipes/generate.py

.venv/ready: pyproject.toml constraints.txt hatch_build.py qkit/native/build.py qkit/native/kernels.c
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@

clean:
	rm -rf .venv qkit-demo
