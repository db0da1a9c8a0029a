# `make demo` and `make test` do everything on a machine that has Python 3.11+ and nothing else.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
MODEL  := models/SmolLM2-135M-Instruct.Q4_1.gguf
HOST   ?= 127.0.0.1
PORT   ?= 8000
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: demo serve chat install dev model test test-contract test-rocm test-static test-xla test-tpu lint types format sizes clean

demo: install model  ## A real model answers over HTTP, then the server stops
	$(BIN)/python examples/demo.py --model $(MODEL) --host $(HOST) --port $(PORT)

serve: install model  ## The same server, until Ctrl-C
	$(BIN)/isthmus serve $(MODEL) --host $(HOST) --port $(PORT)

chat:  ## Talk to the server that `make serve` started
	$(BIN)/isthmus chat --url http://$(HOST):$(PORT)

install: $(VENV)/.installed
dev: $(VENV)/.dev
model: $(MODEL)

$(VENV)/bin/python:
	@echo "Creating $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip

$(VENV)/.installed: pyproject.toml scripts/install_torch.py | $(VENV)/bin/python
	@echo "Installing Isthmus for the CPU (a minute or two the first time)"
	$(BIN)/python scripts/install_torch.py
	$(PIP) -e '.[cpu]'
	$(BIN)/python -m isthmus_cpu.build
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) --group dev
	@touch $@

$(MODEL): scripts/fetch_model.py | $(VENV)/bin/python
	@echo "Fetching SmolLM2-135M-Instruct (93 MB)"
	@$(BIN)/python scripts/fetch_model.py

test: dev model  ## Everything that can run without an accelerator
	$(BIN)/python -m pytest -q -m 'not slow' --ignore tests/kernels
	@# Interpreted kernels keep one core busy each, and nothing in them is timed.
	$(BIN)/python -m pytest -q -m 'not slow' -n logical --maxprocesses 8 tests/kernels

test-contract: dev model  ## The certification kit on the CPU, on no device, and on the example of a vendor's plugin
	$(BIN)/isthmus certify --device cpu
	$(BIN)/isthmus certify --device null
	$(BIN)/python -m pytest -q tests/packaging/test_plugin_example.py
	$(BIN)/python -m pytest -q tests/packaging/test_wheel.py -m slow

test-rocm: dev  ## Compiles every launch of the ROCm backend for five architectures; some minutes, no card needed
	$(BIN)/python tests/kernels/rocm_compile.py --out benchmarks/results/rocm_compile.json

test-static: dev model  ## TPU, Neuron and Gaudi on stand-ins of their SDKs, the certification kit and a server included; some minutes
	$(BIN)/python -m pytest -q tests/static -m 'slow or not slow' --timeout 1800

test-xla:  ## What needs torch_xla 2.9, in an environment of its own (.venv-xla, 2.3 GB)
	$(PYTHON) scripts/xla_env.py .venv-xla
	.venv-xla/bin/python -m pytest -q tests/xla

test-tpu: .venv-tpu/.installed  ## What needs torch_tpu and the TPU's compiler, in an environment of its own (.venv-tpu, 2.7 GB)
	TORCH_DEVICE_BACKEND_AUTOLOAD=0 .venv-tpu/bin/python -m pytest -q tests/tpu

.venv-tpu/.installed: tests/tpu/requirements.txt pyproject.toml scripts/install_torch.py
	$(PYTHON) -m venv .venv-tpu
	TORCH=torch==2.13.0 .venv-tpu/bin/python scripts/install_torch.py
	.venv-tpu/bin/python -m pip install -q --disable-pip-version-check -r tests/tpu/requirements.txt -e .
	@touch $@

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python scripts/sizes.py

types: dev
	$(BIN)/mypy -p isthmus -p isthmus_server

format: dev
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format -q .

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
