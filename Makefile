# Every target sets up .venv when it is missing or older than pyproject.toml. Arguments go through ARGS="...".
PYTHON ?= python3
# Pinned here alone, because the newest torch may pull gigabytes; the package itself takes any torch >= 2.10.
TORCH_VERSION ?= 2.13.0
OLDEST_TRITON ?= 3.6.0
# TorchRec asks for fbgemm-gpu, whose wheel on PyPI needs CUDA to load. The CPU's is built for this torch alone.
TORCHREC := torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0
KERNEL_TESTS := $(wildcard tests/test_kernel_*.py tests/test_triton_*.py) tests/test_launch.py tests/test_tiles.py tests/test_tune.py
ARGS ?=
RANKS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
READY := .venv/.ready
BENCH_READY := .venv/.ready-bench
OLDEST_READY := .venv-oldest-triton/.ready
export PIP_NO_INPUT := 1

.PHONY: help example example-swap example-distributed test test-all test-gpu test-oldest-triton bench bench-gpu tune style types

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

example: $(READY)  ## train on Census-Income: tables and two pictures (ARGS="--rows 20000" for a short run)
	$(BIN)/python examples/census_income.py $(ARGS)

example-swap: $(READY)  ## train models of torch-rechub and DeepCTR-Torch before and after accelerate (ARGS="--rows 20000")
	$(BIN)/python examples/accelerate_torch_rechub.py $(ARGS)
	$(BIN)/python examples/accelerate_deepctr_torch.py $(ARGS)

example-distributed: $(READY)  ## train on RANKS processes (2), with checkpoints and resume (ARGS="--rows 20000")
	$(BIN)/python -m torch.distributed.run --standalone --nproc-per-node $(RANKS) examples/train_distributed.py $(ARGS)

test: $(READY)  ## the tests, without the slow ones
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(READY)  ## all tests
	$(BIN)/python -m pytest $(ARGS)

test-oldest-triton: $(OLDEST_READY)  ## the tests of the kernels on the oldest triton that is supported
	.venv-oldest-triton/bin/python -m pytest -m "not slow" $(KERNEL_TESTS) $(ARGS)

test-gpu: $(READY)  ## the tests that take a device, on a GPU
	$(BIN)/python -m pytest --device cuda --only-device $(ARGS)

bench: $(BENCH_READY)  ## time forward, training step and inference against the peers, and render the report
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-gpu: $(BENCH_READY)  ## the same on the GPU here (ARGS="--sizes small,medium --minutes 9")
	$(BIN)/python benchmarks/run_gpu.py $(ARGS)

tune: $(READY)  ## measure kernel tiles for the GPU here (ARGS="--in-features 512 --num-tasks 3 --batch 16384")
	$(BIN)/python -m ple_fast.tune $(ARGS)

style: $(READY)  ## lint and format, checked (mend with .venv/bin/ruff check --fix, .venv/bin/ruff format)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)  ## mypy --strict
	$(BIN)/mypy $(ARGS)

$(READY): pyproject.toml
	@echo "Setting up .venv; this takes a minute or two"
	$(PYTHON) -m venv .venv
	$(PIP) torch==$(TORCH_VERSION)
	$(PIP) --editable ".[dev,viz,examples,peers]"
	test "$$(uname -sm)" != "Linux x86_64" || $(PIP) --no-deps $(TORCHREC)
	@touch $@

$(OLDEST_READY): pyproject.toml
	$(PYTHON) -m venv .venv-oldest-triton
	.venv-oldest-triton/bin/python -m pip --disable-pip-version-check install --quiet \
		torch==$(TORCH_VERSION) triton==$(OLDEST_TRITON) numpy safetensors pytest hypothesis
	@touch $@

$(BENCH_READY): $(READY)
	$(PIP) --editable ".[dev,viz,examples,bench]"
	@touch $@
