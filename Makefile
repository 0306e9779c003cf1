# One command sets everything up:   make demo | make test | make lint | make bench
PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint bench clean
demo: $(VENV)/.demo
	$(BIN)/lowrank compare

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.dev
	$(BIN)/python bench/lora_linear.py

# torch first and alone: asked for as a dependency, pip may pick another build with several GB of CUDA packages.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[compare]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) build dist *.egg-info
