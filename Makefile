# Loraplex. `make` alone prints what there is.

PYTHON ?= python3
# What this machine can run: the CUDA build of vLLM where there is an NVIDIA GPU, else the CPU build.
BUILD ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu)
# More arguments for pip, such as an extra index where torch's CPU wheels are found:
#   make setup PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
INPUTS ?= 1000000
MODEL ?= .models/smollm2-135m-instruct
ARGS ?=

BIN := .venv/bin
AUDIT := .venv/audit/bin
EXAMPLES := support/v1 support/v2 legal/v1 code/v1
ADAPTERS := $(addprefix examples/,support/v1 legal/v1 code/v1)
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
READY := .venv/.ready-$(BUILD)
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup model demo cluster-demo serve examples test test-fast fuzz check proto docs supply-chain bench loadtest loadtest-compare \
	loadtest-selftest clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 20

setup: $(READY) ## make .venv with all that is needed, for this machine (CUDA or CPU)

$(READY): $(BUILD).lock dev.lock pyproject.toml engine/vllm_plugin/lora.cpp
	$(PYTHON) -m venv .venv
	@echo "installing the $(BUILD) build: $$(cat $(BUILD).lock dev.lock | grep -c ==) packages, about two minutes"
	$(PIP) install --quiet --no-deps $(PIP_ARGS) -r $(BUILD).lock -r dev.lock
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@rm -f .venv/.ready-* && touch $@

model: setup ## prepare the small base model of the demo and the tests
	@$(BIN)/python examples/prepare_model.py $(MODEL)

demo: model ## three adapters and the base in one batch; promote, roll back, stop
	@$(BIN)/python examples/demo.py --model $(MODEL) $(ARGS)

cluster-demo: model ## two engines on Ray behind a router; one is killed under traffic, and no answer is lost
	@$(BIN)/python examples/cluster_demo.py --model $(MODEL) $(ARGS)

serve: model ## serve the demo's adapters until Ctrl-C
	@$(BIN)/python examples/demo.py --model $(MODEL) --serve $(ARGS)

examples: model ## make the demo's data and adapters again, by their recipes: about 16 minutes on two cores
	$(BIN)/python examples/make_data.py
	@for version in $(EXAMPLES); do $(BIN)/loraplex train examples/$$version.yaml --out examples/$$version $(ARGS) || exit 1; done

test: check model ## every check and every test (the real engine included)
	$(BIN)/python -m pytest $(ARGS)

test-fast: setup ## the tests that need no model, on every core
	$(BIN)/python -m pytest -m "not model and not slow" -n auto --dist worksteal $(ARGS)

fuzz: setup ## random calls and damaged files: a million (INPUTS=20000 is what make test sends); about half an hour
	LORAPLEX_FUZZ_INPUTS=$(INPUTS) $(BIN)/python -m pytest tests/fuzz $(ARGS)

check: setup ## format, lint, types, layers, protos, dashboards
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/buf format --diff --exit-code --exclude-path protos/buf protos
	$(BIN)/python protos/generate.py --check
	$(BIN)/python protos/reference.py --check

proto: setup ## regenerate engine/api and docs/api.md from protos/
	$(BIN)/python protos/generate.py
	$(BIN)/python protos/reference.py

docs: setup ## the documentation as a site, in out/site (ARGS=serve shows it while you write)
	$(PIP) install --quiet --no-deps -r docs.lock
	$(BIN)/mkdocs $(if $(ARGS),$(ARGS),build --strict --site-dir out/site)

supply-chain: setup ## what is installed: bill of materials (CycloneDX), licences, known vulnerabilities, in out/supply-chain
	@mkdir -p out/supply-chain
	@test -x $(AUDIT)/pip-audit || { $(PYTHON) -m venv .venv/audit && $(AUDIT)/python -m pip install --quiet --no-deps -r audit.lock; }
	$(AUDIT)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --of JSON \
		-o out/supply-chain/sbom.cdx.json $(BIN)/python
	$(AUDIT)/pip-licenses --python $(BIN)/python --format=csv --with-urls --order=license \
		--output-file out/supply-chain/licences.csv
	@# Asks PyPI's database, where that can be reached.
	$(AUDIT)/pip-audit --strict --requirement $(BUILD).lock --no-deps --disable-pip --progress-spinner off \
		--format json --output out/supply-chain/vulnerabilities.json

bench: export LORAPLEX_MODEL = $(MODEL)
bench: model ## what many adapters cost, then the front end; ARGS="adapters --full", ARGS="--help"
	@$(if $(ARGS),$(BIN)/python -m loadtest.bench $(ARGS),$(BIN)/python -m loadtest.bench adapters)
	@$(if $(ARGS),,$(BIN)/python -m loadtest.bench frontend)

loadtest: model ## does it meet its requirements? a quick selection on a server of its own
	@$(BIN)/python -m loadtest run smoke steady churn --quick --serve $(MODEL) $(ADAPTERS:%=--adapter %) $(ARGS)

loadtest-compare: model ## the same requests for vLLM's own server and ours, in turns: ratios
	@$(BIN)/python -m loadtest compare --quick --serve $(MODEL) $(ADAPTERS:%=--adapter %) --peer vllm \
		--scenario steady --scenario skew/distinct --scenario cliff/a10 --scenario neighbour $(ARGS)

loadtest-selftest: setup ## test the load test: 100 planted faults, 20 clean runs
	@$(BIN)/python -m loadtest selftest --long

clean: ## remove everything that make made
	rm -rf .venv .models .loraplex build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
