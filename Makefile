# Two commands to know: make demo, make test. Each sets up what it needs in .venv first.
SHELL := /bin/bash
PY := .venv/bin/python
ARGS ?=
WORKERS ?= 3
BENCH ?= ingest sampling scaleout
DEMO = $(dir $(lastword $(sort $(wildcard demo/experiments/*/checkpoints/best.json))))

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test exhaustive lint audit format bench gpu docs notebook dist lock clean distclean

help:  ## This list
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/make \1\t\2/p' Makefile | expand -t 18

setup:  ## Create .venv and install everything (PYTHON=python3.12: with that interpreter)
	@scripts/setup.sh

demo: setup  ## Train on generated images with two workers and show samples, in ./demo
	$(PY) -m m2d demo $(ARGS)

serve: setup  ## The page on the demo's checkpoint, which `make demo` has trained: http://127.0.0.1:8000
	@test -n "$(DEMO)" || { echo "error: ./demo has no checkpoint; run make demo first" >&2; exit 2; }
	$(PY) jobs/serve.py --checkpoint $(DEMO)best --directory ./demo/serving --gates.enabled false $(ARGS)

test: setup  ## The tests, in three processes; make test WORKERS=0 ARGS="tests/data -k decode" for some, in one
	@scripts/setup.sh browser
	$(PY) -m pytest --durations=25 --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder $(ARGS)

exhaustive: setup  ## The tests that take minutes each: nodes that are taken away, a worker that hangs, a sweep of six trials
	$(PY) -m pytest --durations=0 -m exhaustive $(ARGS)

lint: setup  ## Style, types and who may import whom
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

audit: setup  ## Known vulnerabilities of requirements.lock; skipped, aloud, where no database of them answers
	$(PY) scripts/audit.py $(ARGS)

format: setup  ## Rewrite the sources as ruff formats them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup  ## Side-by-side measurements; make bench BENCH=gates ARGS="..." for one (--help tells what it needs)
	@set -e; for name in $(BENCH); do echo "== bench/$$name.py"; $(PY) "bench/$$name.py" $(ARGS); done

gpu: setup  ## Test and measure this machine's GPU in five minutes: docs/results/gpu-NAME.md, ready to be sent in
	$(PY) bench/gpu.py $(ARGS)

docs: .venv-docs/made  ## The site, in ./site: strict, so that a dead link is an error (ARGS="serve" shows it while you write)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs $(or $(ARGS),build)

notebook: setup  ## Run docs/tutorial.ipynb whole, on two cores in minutes
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-notebook.txt
	$(PY) -m pytest -m exhaustive tests/test_notebook.py $(ARGS)

dist: .venv-docs/made  ## Wheel and source archive in ./dist, checked by twine
	rm -rf dist
	.venv-docs/bin/python -m build
	.venv-docs/bin/twine check --strict dist/*

.venv-docs/made: requirements-docs.txt
	$(or $(PYTHON),python3) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	touch $@

lock: setup  ## Write requirements.lock from the versions in .venv
	$(PY) scripts/lock.py

clean:  ## Remove caches, build output and ./demo; experiments and .venv stay
	rm -rf build dist site demo bench/out *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## The same, and the environments
	rm -rf .venv .venv-docs
