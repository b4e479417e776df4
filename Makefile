# Two commands on a fresh machine: `make demo` runs the whole pipeline, `make test` the suite. Both set up .venv first.
PYTHON ?= python3
# A CUDA machine takes the CUDA build from PyPI as it is; elsewhere the same version from PyTorch's CPU index works, too.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Triton for the tests that compile for GPUs without having one: 198 MB to download, 690 MB unpacked.
# Beside the packages, not among them: all else runs as on a machine without it.
GPU_COMPILER := $(VENV)/gpu-compiler
TRITON := triton==3.7.1

# vLLM for the CPU, for the tests marked `engine`: an environment of its own, 3.5 GB.
ENGINE := $(VENV)/engine
ENGINE_STAMP := $(ENGINE)/.installed

.PHONY: demo test test-slow test-all check docs format bench clean gpu-compiler engine

demo: $(STAMP)
	$(BIN)/python -m flows.pipeline demo

# Three processes for two cores: many tests wait. A file's tests share what they made, so they stay together.
PYTEST := -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(BIN)/python $(PYTEST) -m "not slow and not long"

# Endurance, many kills, clusters and servers.
test-slow: $(STAMP)
	$(BIN)/python $(PYTEST) -m slow

# All, and compiling for each kind of GPU, the whole rehearsal on one, every way in which ranks end.
test-all: $(STAMP)
	$(BIN)/python $(PYTEST) --durations 40

gpu-compiler: $(GPU_COMPILER)

$(GPU_COMPILER): | $(STAMP)
	rm -rf $@.part
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part $(TRITON)
	mv $@.part $@

engine: $(ENGINE_STAMP)

$(ENGINE_STAMP): $(shell find tests/engine -name "*.toml" -o -name requirements.txt) | $(STAMP)
	rm -rf $(ENGINE)
	$(PYTHON) -m venv $(ENGINE)
	$(ENGINE)/bin/python -m pip install --quiet --no-deps --requirement tests/engine/requirements.txt
	$(ENGINE)/bin/python -m pip install --quiet --no-deps tests/engine/vllm_on_cpu
	$(ENGINE)/bin/python -m pip install --quiet --no-deps --target $(ENGINE)/interpreter tests/engine/triton_interpreter
	touch $(ENGINE_STAMP)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m docs.reference --check

# The page of all settings, from the models that check them.
docs: $(STAMP)
	$(BIN)/python -m docs.reference

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# torch goes first and alone: the rest then finds it there and does not look for another build.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
