# The README's two commands; each sets up all it needs on a machine with python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV ?= .venv
OUT ?= leeway-demo
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-fast check docs readme-figure clean

demo: $(VENV)/.runs
	@$(VENV)/bin/leeway demo --out $(OUT)

# two workers of one thread each: threads that share a core wait for each other by spinning
test: check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

# without the tests marked slow: kills, Ray, browser, servers, simulations, whole studies, executed docs
test-fast: $(VENV)/.develops
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

check: $(VENV)/.develops
	$(VENV)/bin/ruff check src tests
	$(VENV)/bin/ruff format --check src tests
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(VENV)/.documents
	$(VENV)/bin/python -m mkdocs build --strict
	@echo "$(CURDIR)/site/index.html"

# the README's figure, from the embedded study
readme-figure: demo
	cp $(OUT)/figures/tradeoff.png docs/tradeoff.png

# torch first and pinned: another package's request for it would take a build with gigabytes of GPU libraries
$(VENV)/.runs: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "leeway needs python3 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "setting up $(VENV) (a few minutes, once)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) torch
	@$(PIP) --editable .
	@touch $@

$(VENV)/.develops: $(VENV)/.runs
	@$(PIP) --editable '.[dev,oracle,smollm2,api,serve,inspect,lm-eval,ray,docs]'
	@touch $@

$(VENV)/.documents: $(VENV)/.runs
	@$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) $(OUT) build dist site
