# `make help` lists the targets. Everything is installed into .venv (and .venv-next) here; nothing needs root or a GPU.

JAX      := jax==0.11.2
JAX_NEXT := jax>=0.12,<0.13
PIP      := python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PINS     := pyproject.toml constraints.txt requirements-models.txt Makefile
SOURCES  := memjax pallas_kernels benchmarks tests
PYTEST   ?= -q
PARALLEL ?= -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

export JAX_PLATFORMS ?= cpu

.PHONY: help demo test test-all smoke-next lint format notebooks results clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 14

demo: .venv/installed-demo ## fine-tune the packaged SmolLM2 on the King James Bible, its frozen weights kept in 4 bits
	rm -rf runs/demo
	.venv/bin/memjax finetune --model smollm2 --data kjv --out runs/demo

test: lint smoke-next .venv/installed-test ## every check that CI makes
	MEMJAX_REQUIRE_WEIGHTS=1 .venv/bin/python -m pytest $(PYTEST) $(PARALLEL) -m "not slow and not gpu"

test-all: lint smoke-next .venv/installed-test ## the same, with full products in place of samples
	MEMJAX_REQUIRE_WEIGHTS=1 .venv/bin/python -m pytest $(PYTEST) $(PARALLEL) -m "not gpu"

smoke-next: .venv-next/installed-test # the tests marked `smoke` on the newest jax that memjax admits
	.venv-next/bin/python -m pytest $(PYTEST) -m smoke

lint: .venv/installed-test ## style, who imports whom, and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/mypy

format: .venv/installed-test ## rewrite the sources in the project's style
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

notebooks: .venv/installed-test ## execute every notebook
	.venv/bin/python -m pytest $(PYTEST) -m slow tests/test_notebooks.py

results: .venv/installed-demo ## write RESULTS.md and its pictures in benchmarks/ from the recorded results
	.venv/bin/python -m benchmarks.results

clean: ## remove the environments, caches and build outputs; runs/ stays
	rm -rf .venv .venv-next build *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is made again when what it installs changes.
.venv/installed-demo: $(PINS)
	tools/make_venv .venv
	.venv/bin/$(PIP) --editable '.[demo]' '$(JAX)'
	.venv/bin/$(PIP) --no-deps --requirement requirements-models.txt
	@touch $@

.venv/installed-test: .venv/installed-demo
	.venv/bin/$(PIP) --editable '.[demo,test]' '$(JAX)'
	@touch $@

.venv-next/installed-test: $(PINS)
	tools/make_venv .venv-next
	.venv-next/bin/$(PIP) --editable '.[test]' '$(JAX_NEXT)'
	.venv-next/bin/$(PIP) --no-deps --requirement requirements-models.txt
	@touch $@
