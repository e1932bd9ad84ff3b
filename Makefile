# Everything is made from nothing by `make demo` or `make test`; both reuse what is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
EXTENSION_SOURCES := setup.py $(wildcard csrc/*.hpp csrc/*.cpp csrc/*.cu csrc/*/*.hpp csrc/*/*.cpp csrc/*/*.cu)

.DEFAULT_GOAL := help

.PHONY: help
help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Computron needs Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@c=$${CXX:-g++}; command -v $$c >/dev/null || \
		{ echo "no C++ compiler found ($$c): install g++ 10 or newer, or set CXX" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) install --progress-bar on -q -c constraints.txt "setuptools>=77" wheel pybind11
	$(PIP) install --progress-bar on -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(EXTENSION_SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

.PHONY: install
install: $(VENV)/.built  ## Make .venv, install Computron and its tools, build the extension

.PHONY: demo
demo: install  ## Fetch three real models and serve them from too little device memory
	$(BIN)/python examples/demo.py

.PHONY: train
train: install  ## Train a language model with two workers and the Parameter Service
	$(BIN)/python examples/train_language_model.py

.PHONY: test
test: install  ## Lint, type-check and test
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check
	$(BIN)/python -m computron.models.demo
	$(BIN)/python -m pytest $(PYTEST_ARGS)
	scripts/test-sanitizers address -- -q

.PHONY: check
check: install  ## Lint and type-check only
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

.PHONY: format
format: install  ## Format Python and C++
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files '*.cpp' '*.hpp' '*.cu')

.PHONY: bench
bench: install  ## Run every benchmark for under a minute each
	@for b in benchmarks/bench_*.py; do echo "== $$b"; $(BIN)/python $$b --quick || exit 1; done

.PHONY: clean
clean:  ## Remove what the build made, .venv included
	rm -rf $(VENV) build dist *.egg-info computron/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
