# Two commands do everything, set-up included: `make demo` (the main job, real model) and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# one thread per core at most, and none that spins while it waits: on few cores spinning costs more than it gives
export OMP_WAIT_POLICY ?= passive
export HF_HUB_OFFLINE = 1

.PHONY: demo test test-all bench format clean

$(VENV)/.ready: pyproject.toml constraints.txt arma_mergekit.pth arma_mergekit.start
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python recipes/icd10/build.py
	$(BIN)/arma plan recipes/icd10/recipe.yml
	rm -rf recipes/icd10/out/merged
	$(BIN)/mergekit-yaml recipes/icd10/recipe.yml recipes/icd10/out/merged
	$(BIN)/arma-tune recipes/icd10/recipe.yml --eval general,domain --trials 12 --out recipes/icd10/out/run
	$(BIN)/arma merge recipes/icd10/out/run/tuned.yml recipes/icd10/out/tuned --overwrite
	$(BIN)/arma verify recipes/icd10/out/tuned
	$(BIN)/arma gate recipes/icd10/out/tuned --recorded

test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --durations=10

test-all: test
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

bench: $(VENV)/.ready
	$(BIN)/python recipes/icd10/build.py
	$(BIN)/python benchmarks/cases.py --case icd10

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
