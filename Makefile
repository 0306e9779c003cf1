# One command sets everything up:   make demo | make test | make lint | make bench [NAMES="shrink lora_linear"] | make hub REPO=you/lowrank
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin
NAMES  ?= all
REPO   ?= ACCOUNT/lowrank

.PHONY: demo test compile-all lint bench hub clean
demo: $(VENV)/.demo
	$(BIN)/lowrank compare

# Kernels run in Triton's interpreter, so they need a process of their own: it is decided when triton is imported.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
	TRITON_INTERPRET=1 LOWRANK_BACKEND=triton OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" \
	    tests/kernels tests/ops tests/nn tests/integrations/test_peft.py tests/integrations/test_siblings.py \
	    tests/integrations/test_hub.py::test_every_layer_runs_on_the_kernel_as_it_does_patched

# The whole matrix of configs, dtypes and architectures, with this Triton and with the one beside torch 2.11: hours.
compile-all: $(VENV)/.dev $(VENV)-triton-3.6/.done
	$(BIN)/python -m pytest -m compile_all tests/kernels/test_compile.py
	PYTHONPATH=. $(VENV)-triton-3.6/bin/python -m pytest -m compile_all tests/kernels/test_compile.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.dev
	$(BIN)/python bench/run.py $(NAMES) --out bench/results/local
	$(BIN)/python bench/report.py bench/results/local

# The layout of a kernel repository of the Hugging Face Hub: docs/hub.md.
hub:
	$(PYTHON) .ci/hub.py build/hub --repo-id $(REPO)

# torch first and alone: asked for as a dependency, pip may pick another build with several GB of CUDA packages.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	touch $@

# Without build isolation: setup.py compiles csrc/ against this torch.
INSTALL = $(BIN)/python -m pip install -q --disable-pip-version-check
$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*)
	$(INSTALL) 'setuptools>=77' ninja
	$(INSTALL) --no-build-isolation -e '.[compare]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*)
	$(INSTALL) 'setuptools>=77' ninja
	$(INSTALL) --no-build-isolation -e '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)-triton-3.6/.done: $(VENV)/.torch
	$(PYTHON) -m venv $(VENV)-triton-3.6
	$(VENV)-triton-3.6/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(VENV)-triton-3.6/bin/python -m pip install -q --disable-pip-version-check triton==3.6.0 'numpy<2.4' pytest
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-triton-3.6 build dist *.egg-info
