# `make demo` trains on the bundled digits, `make test` runs the tests; both set themselves up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest

.PHONY: help demo test test-oldest test-gpu setup style quality docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     train DeiT-Ti with Spiral RoPE on the bundled digits and evaluate it"
	@echo "make test     run the tests"
	@echo "make test-oldest   run the tests with the lowest versions that pyproject.toml allows"
	@echo "make test-gpu      run the tests that need a GPU"
	@echo "make docs     write the reference of commands and draw the figures of the method"
	@echo "make style    format the code; make quality checks format, lint and types"

setup: $(STAMP)

$(STAMP): pyproject.toml
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
		--config-settings editable_mode=compat --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/spiralrope pretrain --arch deit-ti --rotate 2 --data digits --out runs/demo

# Small networks gain nothing from a second thread; the suite does from a second process.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Each `>=` of pyproject.toml as `==`; what these pull in is the newest that they allow.
$(OLDEST)/.installed: pyproject.toml
	@echo "Setting up $(OLDEST) (a few minutes the first time) ..."
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@grep -oE '"[A-Za-z0-9_-]+>=[0-9.]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/' \
		> $(OLDEST)/lowest.txt
	@# The pip of Python 3.10 tries dozens of versions of what is not to blame, without end.
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check --upgrade pip
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check \
		--constraint $(OLDEST)/lowest.txt \
		--config-settings editable_mode=compat --editable '.[dev]'
	@touch $@

test-oldest: $(OLDEST)/.installed
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal

test-gpu: $(STAMP)
	@$(BIN)/python -m pytest -m gpu tests/gpu

style: $(STAMP)
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

quality: $(STAMP)
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

docs: $(STAMP)
	@$(BIN)/python docs/cli_reference.py && $(BIN)/python docs/channel_layout.py
	@cd docs/images && for figure in \
		"--rotate 1 --rotate 2 --rotate 4 --show rose --out rope-directions.svg" \
		"--rotate 2 --show rose --show frequencies --out rope-rotate2.png" \
		"--rotate 2 --rotate 4 --show clamp --out rope-clamp.png" \
		"--rotate 1 --rotate 2 --rotate 4 --show score --out rope-scores.png"; \
	do $(abspath $(BIN))/spiralrope plot rope $$figure; done

clean:
	rm -rf $(VENV) build dist *.egg-info
