# Everything from a bare machine with python3.11+ and make: the first target you ask for makes .venv and installs into it.
#
#   make demo     run the main job: grid of prompt length x batch size x max tokens, table and pictures
#   make test     the whole default test suite, on up to four cores
#   make check    lint, format, types, import contracts, line caps
#   make bench    pytest-benchmark suites, measured
#   make nightly  every architecture (writes docs/models.md); random walks, state machines, fault cells, mutants and slow
#                 tests at length (writes docs/reliability.md)
#   make clean    remove .venv, caches and what runs have written
#
# Settings, as in `make test PYTHON=python3.12`:
#   PYTHON     interpreter that makes the virtual environment
#   VENV       where it goes
#   TORCH      which torch to install; must satisfy the range in pyproject.toml
#   PIP_ARGS   passed to every pip install, e.g. PIP_ARGS="--index-url https://mirror.example/simple"
#   ARGS       passed to the target's command, e.g. make test ARGS="-k planner", make demo ARGS="model=qwen3_0_6b"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP_ARGS ?=
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP_INSTALL := $(BIN)/python -m pip install $(PIP_ARGS)

.PHONY: demo test check bench nightly clean install

demo: $(READY)
	$(BIN)/python -m llmkit.run scheduler=continuous cache=paged $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/test_house.py

bench: $(READY)
	$(BIN)/python -m pytest benchmarks --benchmark-enable $(ARGS)

nightly: $(READY)
	@code=0; \
	$(BIN)/python -m tests.nightly.architectures || code=1; \
	$(BIN)/python -m tests.nightly.run $(ARGS) || code=1; \
	exit $$code

install: $(READY)

# PyPI's torch for Linux is a CUDA build of several gigabytes. Where no NVIDIA driver is loaded the CPU build is taken:
# from the configured index or wheel folder if that has one (its version ends in +cpu), else from PyTorch's CPU index.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("llmkit needs Python 3.11 or newer; try make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" = Linux ] && [ ! -e /proc/driver/nvidia/version ]; then \
		echo "installing $(TORCH), CPU build"; \
		$(PIP_INSTALL) -q "$(TORCH)+cpu" 2>/dev/null || $(PIP_INSTALL) "$(TORCH)" --index-url $(TORCH_CPU_INDEX); \
	else \
		echo "installing $(TORCH)"; \
		$(PIP_INSTALL) "$(TORCH)"; \
	fi
	$(PIP_INSTALL) -q -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info outputs multirun plots
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find llmkit plugins tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +
