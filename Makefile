# One command sets everything up:   make demo | make test | make check | make lint | make bench [NAMES="shrink lora_linear"]
#                                   make bench-readme | make test-cpus [ONLY=avx2] | make test-install | make compile-all | make hub REPO=you/lowrank
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin
NAMES  ?= all
REPO   ?= ACCOUNT/lowrank

.PHONY: demo test check test-cpus test-install compile-all lint bench bench-readme hub clean
demo: $(VENV)/.demo
	$(BIN)/lowrank compare

# Kernels run in Triton's interpreter, so they need a process of their own: it is decided when triton is imported.
PYTEST      = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
INTERPRETER = TRITON_INTERPRET=1 LOWRANK_BACKEND=triton $(PYTEST) -m "not slow"

# Both lanes, whatever the first says; red if either is.
test: $(VENV)/.dev
	@status=0; set -x; \
	$(PYTEST) -rs || status=1; \
	$(INTERPRETER) tests/kernels tests/ops tests/nn tests/integrations/test_peft.py tests/integrations/test_siblings.py \
	    tests/integrations/test_hub.py::test_every_layer_runs_on_the_kernel_as_it_does_patched || status=1; \
	exit $$status

# For the day's work, under 90 s: style, the ops and layers, PEFT under the patch, and one kernel of each kind.
check: lint
	@status=0; set -x; \
	$(PYTEST) -q -m "not slow" tests/ops tests/nn tests/test_imports.py tests/integrations/test_peft.py tests/integrations/test_siblings.py || status=1; \
	$(INTERPRETER) -q tests/kernels -k as_right_as_eager || status=1; \
	exit $$status

# The numeric tests as on other CPUs: make test-cpus, or some settings of tests/other_cpus.sh: make test-cpus ONLY="avx2 nehalem"
test-cpus: $(VENV)/.dev
	PYTHON=$(BIN)/python ONLY="$(ONLY)" bash tests/other_cpus.sh

test-install:
	TORCH="$(TORCH)" PYTHON=$(PYTHON) bash tests/install.sh

# The whole matrix of configs, dtypes and architectures, with this Triton and with the one beside torch 2.11: hours.
compile-all: $(VENV)/.dev $(VENV)-triton-3.6/.done
	$(BIN)/python -m pytest -m compile_all tests/kernels/test_compile.py
	PYTHONPATH=. $(VENV)-triton-3.6/bin/python -m pytest -m compile_all tests/kernels/test_compile.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python bench/run.py $(NAMES) --out bench/results/local
	$(BIN)/python bench/report.py bench/results/local

# README's and docs/benchmarks.md's figures in one go, ten minutes at most: JSON, tables and charts.
bench-readme: $(VENV)/.dev
	$(BIN)/python bench/readme.py

# The layout of a kernel repository of the Hugging Face Hub: docs/hub.md.
hub:
	$(PYTHON) contrib/hub.py build/hub --repo-id $(REPO)

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
