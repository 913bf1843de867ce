# Two commands on a fresh machine: `make build` and `make test`. Both need Python 3.11 to 3.14, pip and make.

PYTHON ?= python3
SPEC ?= h100.yaml
BIN := .venv/bin
# Processes that run tests side by side.
JOBS ?= 2

.PHONY: build test lint types tests verify tritons docs figures golden gpu sanitize clean

build: .venv/installed
	$(BIN)/m2gen build --spec $(SPEC)

test: lint types tests verify

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

tests: .venv/installed
	$(BIN)/pytest -n $(JOBS) --dist loadfile -q

# On the GPU, else in Triton's interpreter.
verify: .venv/installed
	$(BIN)/m2gen verify --spec tiny.yaml --quick --quiet

# What touches Triton, on every version that m2gen supports or on those of TRITONS, each beside what .venv has.
tritons: .venv/installed
	$(BIN)/python tools/tritons.py $(TRITONS)

# The site, into site/; a broken link ends it.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Every picture of the README and the site, from docs/data.
figures: .venv/installed
	$(BIN)/python -m tools.figures

golden: .venv/installed
	$(BIN)/pytest -q tests/package/test_golden.py --update-golden

# Both need a GPU; sanitize also compute-sanitizer, of the CUDA toolkit.
gpu: .venv/installed
	$(BIN)/pytest -m gpu -q

sanitize: .venv/installed
	$(BIN)/python tests/gpu/sanitize.py

# torch first: what depends on it must find the pinned build rather than choose one.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist site
