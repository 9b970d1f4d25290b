# Everything happens in .venv, made on first use. ARGS= passes overrides on: make train ARGS="model=small device=mps"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
MINUTES ?= 60
MUTANTS ?=
NANOGPT ?=
TEXT ?=
# a module is compiled when it is first imported, not twenty thousand of them now; that has to be kept
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install train test lint check docs bench stress mutants tensorboard clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F '\t' '{printf "make %-12s %s\n", $$1, $$2}'

$(VENV)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -e ".[dev]"
	touch $@

install: $(VENV)/.dev ## everything for development

train: $(VENV)/.core ## train on input.txt; ARGS= are overrides
	$(BIN)/python -m gpt_lightning.train $(ARGS)

test: $(VENV)/.dev ## run the tests; ARGS= go to pytest
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test ## lint and test

docs: $(VENV)/.dev ## the documentation as a site in site/
	$(BIN)/mkdocs build

bench: $(VENV)/.dev ## speed and memory on a CPU, for hours; NANOGPT=DIR, a checkout, and TEXT=FILE add that peer
	$(BIN)/python benchmarks/startup.py tokenizer=gpt2
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/steps.py $(if $(NANOGPT),--nanogpt $(NANOGPT))
	$(BIN)/python benchmarks/planning.py --picture outputs/planning.png
	$(BIN)/python benchmarks/preparation.py
	$(BIN)/python benchmarks/distributed.py
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/checkpoints.py --rounds 1
	$(if $(and $(NANOGPT),$(TEXT)),$(BIN)/python benchmarks/time_to_loss.py --nanogpt $(NANOGPT) --text $(TEXT))
	$(BIN)/python benchmarks/ablations.py outputs/ablations

stress: $(VENV)/.dev ## interrupt random runs for MINUTES=60; ARGS="--seed 7 --lanes 2" are its options
	$(BIN)/python -W ignore -m tests.stress --minutes $(MINUTES) $(ARGS)

mutants: $(VENV)/.dev ## whether the tests notice changes of the code; MUTANTS=NAME… are some of them
	$(PIP) -e ".[mutants]"
	OMP_NUM_THREADS=1 $(BIN)/python -m mutmut run $(MUTANTS)
	$(BIN)/python -m mutmut results

tensorboard: $(VENV)/.core ## curves of all runs under outputs/
	$(BIN)/python -m gpt_lightning.report runs=outputs tensorboard=6006 $(ARGS)

clean: ## remove the environment and what tools left; runs in outputs/ stay
	rm -rf $(VENV) build dist site mutants *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
