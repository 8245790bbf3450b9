# Everything runs in .venv, which the first target makes. PYTHON chooses the interpreter (3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

BROWSER := $(VENV)/.browser

.PHONY: demo test test-vllm nightly check bench bench-cpu sanitize aarch64 format docs wheels clean

demo: $(STAMP)
	$(BIN)/python scripts/demo.py --output demo-output

test: $(STAMP) $(BROWSER)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# The real vLLM, in an environment of its own (3.5 GB; transformers is newer there than its wheel asks for).
test-vllm:
	$(PYTHON) scripts/vllm_environment.py .venv-vllm
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest tests/plugin -p no:cacheprovider -o filterwarnings=default

nightly: $(STAMP)
	$(BIN)/python -m pytest -m nightly

check: $(STAMP)
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/docs_drift.py
	$(BIN)/python scripts/additions.py

bench: $(STAMP)
	$(BIN)/python benchmarks/uniform.py

bench-cpu: $(STAMP)
	$(BIN)/python benchmarks/cpu.py --output benchmarks/cpu.md

sanitize:
	sh scripts/sanitize.sh

# The kernels on 64-bit ARM, under QEMU.
aarch64:
	sh scripts/aarch64.sh

format: $(STAMP)
	$(BIN)/ruff format src tests scripts benchmarks
	$(BIN)/ruff check --fix src tests scripts benchmarks

# The compiled kernels are built on the way, if there is a C++ compiler; edits to them reinstall.
# torch first and alone: a bare torch would pull gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/constraints.txt \
		$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(STAMP)

# The documentation as a site, in build/site.
docs: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict

# Wheels for this machine's kind of processor in dist/, each tried in an environment of its own.
wheels:
	sh scripts/wheels.sh

# Pages are tested in Debian's Chromium; where it cannot be installed, that test is skipped.
$(BROWSER): $(STAMP)
	sh scripts/browser.sh
	touch $(BROWSER)

clean:
	rm -rf $(VENV) demo-output .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
