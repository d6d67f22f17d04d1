# Two commands for a fresh machine: `make demo` and `make test`.  Both set up their own environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test lint types tests mutants clean

demo: $(READY)  ## fit a VAE to scikit-learn's digits, compare it, draw samples, write a report, compress
	$(BIN)/likely fit digits --model vae --out demo/run --test-fraction 0.2 --steps 2000 --overwrite dropout=0.1
	$(BIN)/likely evaluate demo/run --samples 100
	$(BIN)/likely sample demo/run -n 64 --seed 0 -o demo/samples.npz
	$(BIN)/likely report demo/run -o demo/report.html
	$(BIN)/likely compress demo/run digits -o demo/digits.lk
	$(BIN)/likely decompress demo/digits.lk -o demo/again.npy
	@echo "Samples: demo/samples.npz   Report: demo/report.html   All digits, compressed: demo/digits.lk"

test: lint types tests  ## everything that continuous integration runs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

tests: $(READY)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

mutants: $(READY)  ## inject the classical bugs one at a time; every one must be caught
	$(BIN)/python tests/mutants.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) demo .mypy_cache .pytest_cache .ruff_cache
