# Every target makes the environment first; nothing has to be installed by hand.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.attnbias-stamp
DOCS   := $(VENV)/.attnbias-docs-stamp

export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-all mutants bench lint docs clean

setup: $(STAMP)

$(PY):
	$(PYTHON) -m venv $(VENV)

# torch first and by its exact version: an open range would pull several gigabytes of GPU libraries.
$(STAMP): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev,demo]"
	touch $(STAMP)

demo: $(STAMP)
	$(PY) -m examples.demo --out out

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --timeout 1800

mutants: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m tests.mutants

bench: $(STAMP)
	$(PY) -m benchmarks

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict

$(DOCS): pyproject.toml constraints.txt $(STAMP)
	$(PY) -m pip install --quiet -c constraints.txt -e ".[docs]"
	touch $(DOCS)

docs: $(DOCS)
	$(PY) -m mkdocs build --strict --quiet --site-dir site

clean:
	rm -rf out site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
