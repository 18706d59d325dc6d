# Two commands on a fresh machine: `make demo` and `make test`. Python 3.11+, pip and make are all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
CHOSEN ?= -m "not rare"
SOURCES := cli client conf finetuning privacy protocol server simulations strategies

.PHONY: help demo test test-all check fuzz bench clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-8s %s\n", $$1, $$2}'

# The installed marker is newer than pyproject.toml when the environment fits it.
$(VENV)/.runtime: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"  # one pinned build; any release in the range of pyproject.toml works
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(VENV)/.runtime  ## set up, then fine-tune a small language model over four synthetic clinics, privately
	$(BIN)/cloister simulate

test: $(VENV)/.dev  ## set up, then run the tests, but for the few that are slow and rarely break
	$(BIN)/python -m pytest $(CHOSEN) --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 5 \
		--ignore=tests/privacy/mutations
	$(BIN)/python -m pytest $(CHOSEN) tests/privacy/mutations  # in one process: they fill one table, which is printed

test-all:  ## run every test
	$(MAKE) test CHOSEN=

check: $(VENV)/.dev  ## lint, type-check, and check the import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

SECONDS ?= 300
fuzz: $(VENV)/.dev  ## fuzz what decodes bytes from the network; SECONDS=300 for all targets together
	$(BIN)/pip install --quiet --editable ".[fuzz]"
	$(BIN)/python -W ignore tests/fuzz/fuzz.py --seconds $(SECONDS)

bench: $(VENV)/.dev  ## print the figures of the README, measured here; OPTIONS=--deployment for a deployment's too
	$(BIN)/python -m simulations.bench $(OPTIONS)

clean:  ## remove the environment and the runs
	rm -rf $(VENV) runs
