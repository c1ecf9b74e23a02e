# make train [ARGS="--key=value ..."]   set up, then train a small GPT-2 on text that Python carries
# make test | test-all | lint           set up, then the quick tests | every test | ruff
# PYTHON=python3.12 make ...            with another Python (3.11 or newer)

PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED := 1

.PHONY: train test test-all lint
.DEFAULT_GOAL := train

train: .venv/ready
	$(BIN)/python fineweb.py --source=python-docs
	$(BIN)/python train_gpt2.py configs/tiny.toml $(ARGS)

test: .venv/ready-dev
	$(BIN)/python -m pytest -q -n auto --maxprocesses=8 -m "not slow" $(ARGS)

test-all: test
	$(BIN)/python -m pytest -q -m slow $(ARGS)

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	@touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	@touch $@
