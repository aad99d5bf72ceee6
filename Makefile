# make demo: the main job on a fresh machine.  make test: the tests.  Both build .venv first.
# On Linux without a GPU, `make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu` takes the small CPU build of torch.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo
TORCH_INDEX ?=
ARGS ?=

.PHONY: setup setup-dev demo test chaos soak fuzz lint bench clean

setup: $(VENV)/.runtime
setup-dev: $(VENV)/.dev

$(VENV)/.runtime: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ -n "$(TORCH_INDEX)" ]; then $(BIN)/pip install -q 'torch>=2.6,<2.14' --index-url $(TORCH_INDEX); fi
	$(BIN)/pip install -q -e .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.runtime
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/dmm demo --out $(OUT) $(if $(MODEL),--model $(MODEL)) $(if $(TEXT),--text $(TEXT)) $(if $(LAYER),--layer $(LAYER)) $(ARGS)

# Two processes, a file at a time in each: most of the time tests wait for Ray's processes to start.
test: setup-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Extraction, training and the endpoint stopped, killed and robbed at seeded moments, many times: DMM_CHAOS_TRIALS of them.
chaos: setup-dev
	DMM_CHAOS_TRIALS=$(or $(DMM_CHAOS_TRIALS),10) $(BIN)/python -m pytest -m fault --timeout=1800

# The endpoint under mixed load for ten minutes: memory flat, every answer right.
soak: setup-dev
	DMM_SOAK_S=$(or $(DMM_SOAK_S),600) $(BIN)/python -m pytest tests/serving/test_soak.py --timeout=3600

# Ten thousand odd requests to the endpoint.
fuzz: setup-dev
	DMM_FUZZ_REQUESTS=$(or $(DMM_FUZZ_REQUESTS),10000) $(BIN)/python -m pytest tests/serving/test_fuzz.py --timeout=3600

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup-dev
	$(BIN)/python jobs/bench.py

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
