# make demo   installs, runs the whole loop on the pocket world, ends with a report   (minutes, two CPU cores)
# make test   installs, lints, checks types and imports, runs the tests              (under ten minutes)
# make soak   what takes longer than a test should
# make lint   the checks of `make test` without the tests
# make docs   builds the documentation site into build/site
# make package  builds sdist and wheel, and checks the wheel in an environment of its own
# make clean  removes what these made, but no run

SHELL := bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= runs/demo

.PHONY: demo installed test soak lint format docs package clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/diptych run recipes/demo.yaml --out $(OUT)
	@echo "report: $(CURDIR)/$(OUT)/report/report.html"

installed: $(VENV)/.installed-dev

# Two workers, a thread each: what two cores hold. Files that take long begin first (tests/conftest.py).
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python docs/site/prose.py

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

soak: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m soak

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

# The wheel is built from the sdist, so both are checked: installed, outside the clone, it must draw.
package: $(VENV)/bin/python
	rm -rf dist build/wheel
	$(PIP) install -q 'build>=1'
	$(BIN)/python -m build -q
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install -q dist/*.whl -c constraints.txt
	cd build && wheel/bin/diptych --version && wheel/bin/diptych doctor
	cd build && wheel/bin/diptych generate --model pocket --reference "$$(wheel/bin/python -c \
	  'from diptych.utils.paths import packaged; print(packaged("examples/references/cat.png"))')" \
	  --prompt "a cat on the beach" --steps 4 --out wheel.png
	@ls -l dist

# A stamp is newer than what it was made from, so that an install runs only when there is something to install.
# Python compiles what it imports; of 20,000 installed files that is a few thousand.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q --no-compile -e . -c constraints.txt
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q --no-compile -e '.[dev]' -c constraints.txt
	@touch $@ $(VENV)/.installed

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "diptych needs Python 3.11 or newer; '$(PYTHON)' was not found. Try: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(f"diptych needs Python 3.11 or newer; $(PYTHON) is {v}. Try: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv support; install it (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
