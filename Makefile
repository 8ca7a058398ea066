# Two commands for a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# torch first and by its exact version: as another package's dependency, the newest build with a GPU's libraries would come
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install demo test lint benchmark clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	$(INSTALL) --editable '.[dev]'
	touch $@

demo: install
	rm -rf runs/demo
	$(BIN)/dacnn train --out runs/demo
	$(BIN)/dacnn eval runs/demo --png runs/demo/confusion.png
	$(BIN)/dacnn show runs/demo --png runs/demo/plan.png

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# a worker a core, each with one thread
test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

benchmark: install
	$(BIN)/python benchmarks/training.py

clean:
	rm -rf .venv runs dist
