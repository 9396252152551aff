# make demo | make test | make lint: each alone, on a machine with only Python 3.10 or newer. Uses uv where it is on PATH.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)

.PHONY: demo test lint
demo: $(VENV)/.installed-demo
	$(BIN)/python search.py --model resnet10t --dataset digits --policy autoslim --budget macs=0.5x \
		--search-epochs 15 --epochs 15 --output runs/demo --overwrite

test: $(VENV)/.installed-test
	$(BIN)/ruff check .
	@$(BIN)/python -m pytest -q -n 2

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .

# one stamp per extra, newer than pyproject.toml: nothing is installed again while that has not changed
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
ifneq ($(UV),)
	$(UV) pip install --quiet --python $(BIN)/python --editable '.[$*]'
else
	$(BIN)/python -m ensurepip --upgrade > /dev/null
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
endif
	@touch $@

$(BIN)/python:
	$(if $(UV),$(UV) venv --quiet $(VENV),$(PYTHON) -m venv $(VENV))
