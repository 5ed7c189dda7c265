# Two commands for a fresh machine: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test quick check unit setup clean help

help:
	@echo "make demo   set up, optimize a real model, certify it, print the verdict and the report's path"
	@echo "make test   set up, run all checks"
	@echo "make quick  set up, run what finds most faults in about a minute: formatting, lint, types, what holds"
	@echo "            for every method (but for delivering its result), and one whole search"
	@echo "make clean  remove what the other commands made"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Penjing needs Python 3.11 or newer; try: make PYTHON=python3.11"; exit 5; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "No venv module: apt-get install python3-venv"; exit 5; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

demo: $(READY)
	$(BIN)/penjing demo $(if $(OUT),--out $(OUT))

test: check unit

SEARCH := tests/search/test_optimize.py
quick: check
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -k "not delivered" tests/test_every_method.py \
		$(SEARCH)::test_the_artefact_is_what_the_record_says \
		$(SEARCH)::test_quality_is_certified_on_data_that_the_search_never_saw

check: $(READY)
	$(BIN)/ruff format --check src tests benchmarks examples tools
	$(BIN)/ruff check src tests benchmarks examples tools
	$(BIN)/mypy

unit: $(READY)
	rm -f .coverage .coverage.*
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=
	$(BIN)/coverage report --skip-covered --sort=cover

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* runs
