# make demo   install, then calibrate -> compress -> bench on the bundled miniature
# make test   install, then the fast tests
# make check  ruff and mypy
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow check clean

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/slimdiff calibrate
	$(BIN)/slimdiff compress --budget 0.35 --force
	$(BIN)/slimdiff bench
	@echo "Open slimdiff-out/demo/bench-0.35/report.html in a browser."

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow or cuda"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info
