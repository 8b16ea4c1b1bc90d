# Everything here starts from a fresh clone: python3 (>= 3.10), make and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
COMPILED := $(VENV)/.compiled

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-full crash-test check format lock

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) ## the virtual environment, pinned and hash-checked

# uv is installed by pip into the environment and does the rest; a second run does nothing.
$(INSTALLED): requirements.txt requirements-uv.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else f"Python 3.10 or newer is needed, {sys.executable} is {v.major}.{v.minor}; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements-uv.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --require-hashes --requirement requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# llama.cpp's library, which has no wheel on the index: ten minutes on two cores.
$(COMPILED): $(INSTALLED)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-build-isolation-package qlora-kit --constraints requirements.txt --editable '.[gguf]'
	@touch $@

quickstart: $(INSTALLED) ## teach a small model a task, merge it, certify it (three to ten minutes on two cores)
	$(BIN)/qlora-kit train recipes/quickstart.yaml

# A process of tests for each core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

test: $(INSTALLED) ## every test that needs no GPU
	$(PYTEST)

test-full: $(COMPILED) ## the same, and the slow ones, with llama.cpp (compiled once, ten minutes)
	$(PYTEST) -m "not gpu"

# Of crash-test: how many trials, the seed that they are drawn with (empty: another every time),
# one trial alone by its number, and a scratch folder in which failures are left.
N ?= 200
SEED ?=
ONLY ?=
SCRATCH ?= $(or $(TMPDIR),/tmp)/qlora-kit-crash-test

crash-test: $(INSTALLED) ## kill N=200 runs of random recipes at random places, SEED=… to repeat (an hour)
	PYTHONPATH=tests $(BIN)/python -m crash.harness --trials $(N) --folder $(SCRATCH) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only $(ONLY))

# Of scripts what torch's and other tools' types say of modules is left out: how they call each other counts.
LOOSELY := --ignore-missing-imports $(addprefix --disable-error-code=,union-attr index operator misc override no-any-return call-overload import-untyped)

check: $(INSTALLED) ## before a commit: format, lint, types, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=scripts $(BIN)/mypy --explicit-package-bases $(LOOSELY) scripts
	$(PYTEST) tests/unit

format: $(INSTALLED) ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: $(INSTALLED) ## resolve requirements.txt anew from pyproject.toml and constraints.txt
	$(BIN)/uv pip compile --quiet pyproject.toml --group dev --constraints constraints.txt --universal --python-version 3.10 --generate-hashes --no-header --no-emit-index-url --output-file requirements.txt
