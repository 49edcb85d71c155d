# Every target sets up its environment by itself; a second run reuses it.
# On Linux without CUDA, `make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"` saves gigabytes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= test,lint,docs,build
PIP_ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

FUZZ_EXAMPLES ?= 500
# A worker per core, each with one thread: the tests' tensors are small. Tests that share a world of ranks share a worker.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup --durations=20

.PHONY: demo test test-fast test-oldest fuzz lint docs dist ablation paper benchmarks baselines clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/lightning-spectral demo

# All tests; the 20 slowest are printed.
test: $(READY)
	$(PYTEST)

# Units and documentation alone.
test-fast: $(READY)
	$(PYTEST) tests/unit tests/docs

# Random networks, losses and options against dense Hessians, others each time: a few minutes. For each night.
fuzz: $(READY)
	OMP_NUM_THREADS=1 FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(BIN)/python -m pytest -q tests/property/test_fuzz.py --hypothesis-show-statistics

# The same with the oldest versions that pyproject.toml allows, but for torch.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRAS=test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The manual: site/index.html. Any warning fails.
docs: $(READY)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs site

# Wheel and source distribution in dist/, with their metadata checked.
dist: $(READY)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/twine check --strict dist/*

# Optimizers side by side, three seeds each: examples/ablation.
ablation: $(READY)
	$(BIN)/python examples/ablation/run.py

# The paper's experiments at a small size: examples/paper.
paper: $(READY)
	$(BIN)/python examples/paper/run.py

# Every benchmark, one after the other, into examples/benchmarks/results: hours. CONTRIBUTING.md says how long each takes.
benchmarks: $(READY)
	$(BIN)/python examples/benchmarks/run.py

# The pictures that tests/integration/test_figure_images.py compares with. Look at them before committing them.
baselines: $(READY)
	$(BIN)/python tests/integration/test_figure_images.py

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest demo-runs ablation-runs paper-runs benchmark-runs site dist
