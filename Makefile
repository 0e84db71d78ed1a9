# Every target sets up .venv when it is missing or older than pyproject.toml. Arguments go through ARGS="...".
PYTHON ?= python3
# Pinned here alone; the package itself takes any torch >= 2.10. .ci/install_torch.py chooses its build.
TORCH_VERSION ?= 2.13.0
OLDEST_TRITON ?= 3.6.0
# TorchRec asks for fbgemm-gpu, whose wheel on PyPI needs CUDA to load. The CPU's is built for this torch alone.
TORCHREC := torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0
KERNEL_TESTS := $(wildcard tests/test_kernel_*.py tests/test_triton_*.py) tests/test_launch.py tests/test_tiles.py $(wildcard tests/test_tune*.py)
ARGS ?=
# Tests take one thread each, so there is a worker for each core; with ARGS there is none, and the first test runs at once.
WORKERS ?= $(if $(strip $(ARGS)),0,logical)
PYTEST := -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal
RANKS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
READY := .venv/.ready
BENCH_READY := .venv/.ready-bench
OLDEST_READY := .venv-oldest-triton/.ready
export PIP_NO_INPUT := 1
# Whoever reads a log sees each line when it is written.
export PYTHONUNBUFFERED := 1

.PHONY: help example example-full example-swap example-distributed example-lightning test test-all test-gpu test-oldest-triton bench bench-gpu soak tune style types

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

example: $(READY)  ## train five architectures on a fifth of Census-Income: tables and two pictures, in a minute or two
	$(BIN)/python examples/census_income.py --rows 60000 $(ARGS)

example-full: $(READY)  ## the same on all of its rows: the comparison that the documents quote
	$(BIN)/python examples/census_income.py $(ARGS)

example-swap: $(READY)  ## train models of torch-rechub and DeepCTR-Torch before and after accelerate (ARGS="--rows 20000")
	$(BIN)/python examples/accelerate_torch_rechub.py $(ARGS)
	$(BIN)/python examples/accelerate_deepctr_torch.py $(ARGS)

example-distributed: $(READY)  ## train on RANKS processes (2), with checkpoints and resume (ARGS="--rows 20000")
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(RANKS) examples/train_distributed.py $(ARGS)

example-lightning: $(READY)  ## the trunk in Lightning's Trainer, with torchmetrics (ARGS="--rows 20000")
	$(BIN)/python examples/train_lightning.py $(ARGS)

test: $(READY)  ## the tests, without the slow ones
	$(BIN)/python $(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY)  ## all tests
	$(BIN)/python $(PYTEST) $(ARGS)

test-oldest-triton: $(OLDEST_READY)  ## the tests of the kernels on the oldest triton that is supported
	.venv-oldest-triton/bin/python $(PYTEST) -m "not slow" $(KERNEL_TESTS) $(ARGS)

test-gpu: $(READY)  ## the tests that take a device, on a GPU
	$(BIN)/python -m pytest --device cuda --only-device $(ARGS)

bench: $(BENCH_READY)  ## time forward, training step and inference against the peers, and render the report
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-gpu: $(BENCH_READY)  ## the same on the GPU here (ARGS="--sizes small,medium --minutes 9")
	$(BIN)/python benchmarks/run_gpu.py $(ARGS)

soak: $(READY)  ## random use against what is right, for half an hour (ARGS="--minutes 2", ARGS="--only levels --seed 7")
	$(BIN)/python -m soak $(ARGS)

tune: $(READY)  ## measure what is fastest on the GPU here (ARGS="--trunk small --minutes 9"), or on its CPU (ARGS="--device cpu")
	$(BIN)/python -m ple_fast.tune $(ARGS)

style: $(READY)  ## lint and format, checked (mend with .venv/bin/ruff check --fix, .venv/bin/ruff format)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)  ## mypy --strict
	$(BIN)/mypy $(ARGS)

$(READY): pyproject.toml
	@echo "Setting up .venv, step 1 of 3: torch"
	$(PYTHON) -m venv .venv
	$(BIN)/python .ci/install_torch.py $(TORCH_VERSION)
	@echo "Step 2 of 3: what the tests, examples and checks need, about 500 MB to fetch"
	$(PIP) --editable ".[dev,viz,examples,peers]"
	@echo "Step 3 of 3: TorchRec, on Linux x86_64 only, about 10 MB to fetch"
	test "$$(uname -sm)" != "Linux x86_64" || $(PIP) --no-deps $(TORCHREC)
	@touch $@

$(OLDEST_READY): pyproject.toml
	@echo "Setting up .venv-oldest-triton, step 1 of 2: torch"
	$(PYTHON) -m venv .venv-oldest-triton
	.venv-oldest-triton/bin/python .ci/install_torch.py $(TORCH_VERSION)
	@echo "Step 2 of 2: triton $(OLDEST_TRITON) and what the tests need, about 250 MB to fetch"
	.venv-oldest-triton/bin/python -m pip --disable-pip-version-check install \
		triton==$(OLDEST_TRITON) numpy safetensors pytest pytest-xdist hypothesis
	@touch $@

$(BENCH_READY): $(READY)
	$(PIP) --editable ".[dev,viz,examples,bench]"
	@touch $@
