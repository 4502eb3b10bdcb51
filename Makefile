# `make train` and `make test` work on a fresh machine with python3 and its venv module.

PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/tiny-$(shell date +%Y%m%d-%H%M%S)

.PHONY: train test test-slow lint

train: $(VENV)/installed
	$(VENV)/bin/python train.py --config configs/tiny.py --cpu_devices 8 --workdir $(WORKDIR)

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

# -rs lists what was skipped: two tests of file systems need the right to mount.
test-slow: $(VENV)/installed
	$(VENV)/bin/python -m pytest -q -rs -m slow

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/installed: requirements-cpu.txt requirements-common.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -r requirements-cpu.txt
	touch $@
