# Needs Python 3.10+ and make; everything else goes into .venv.
#
#   make demo       two real servers, realistic traffic, and what was traced
#   make test       lint, types, tests with branch coverage (without the slow tests)
#   make test-all   the same with the slow tests
#   make test-oldest    the tests with the oldest versions of everything that we allow
#   make test-mlflow    the tests against a real MLflow server (installs one into .venv-mlflow), slow ones too
#   make test-versions  the tests of the adapters with several versions of the frameworks
#   make PYTHON=python3.13 test   with another Python
#
# ARGS go to pytest or the benchmarks: make pytest ARGS="tests/test_packaging.py -x"

SUPPORTED := import sys; sys.exit(sys.version_info < (3, 10))
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python3.10 python
ifndef PYTHON
PYTHON := $(shell for p in $(CANDIDATES); do $$p -c "$(SUPPORTED)" 2>/dev/null && { echo $$p; break; }; done)
endif

VENV ?= .venv
BIN := $(VENV)/bin
# The name carries the version, so that another PYTHON makes the environment anew.
VERSION := $(shell "$(PYTHON)" -c "import sys; print('%d.%d.%d' % sys.version_info[:3])" 2>/dev/null)
CREATED := $(VENV)/.created-$(VERSION)
DEMO_INSTALLED := $(VENV)/.demo-installed-$(VERSION)
INSTALLED := $(VENV)/.installed-$(VERSION)
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check $(CONSTRAINTS) --editable
PYTEST := -m pytest -n auto --dist worksteal
ARGS ?=

.DEFAULT_GOAL := test
.PHONY: demo test test-all test-oldest test-versions test-mlflow lint pytest cover bench install clean

demo: $(DEMO_INSTALLED)
	@$(BIN)/python -m example_apps.demo

test: lint
	@$(MAKE) --no-print-directory cover ARGS='-m "not slow" $(ARGS)'

test-all: lint
	@$(MAKE) --no-print-directory cover

test-oldest:
	@$(MAKE) --no-print-directory pytest VENV=$(VENV)-oldest CONSTRAINTS="--constraint tests/oldest.txt"

test-versions: $(INSTALLED)
	$(BIN)/python -m tests.versions $(ARGS)

test-mlflow: $(INSTALLED) $(VENV)-mlflow/.installed-$(VERSION)
	TRACEMW_TEST_MLFLOW=$(abspath $(VENV)-mlflow/bin/python) $(BIN)/python -m pytest \
	  tests/delivery/test_mlflow.py tests/delivery/test_scenarios.py tests/delivery/test_postgresql.py $(ARGS)
	PYTHONPATH=$(CURDIR) $(VENV)-mlflow/bin/python -m pytest -q -p tracemw.testing -p no:cacheprovider tests/mlflow $(ARGS)

$(VENV)-mlflow/.installed-$(VERSION):
	"$(PYTHON)" -m venv --clear $(VENV)-mlflow
	@$(VENV)-mlflow/bin/python -m pip install -qq --disable-pip-version-check 'mlflow>=3.12' psycopg2-binary \
	  pytest hypothesis fastapi 'flask[async]' contextvars-extras lark click
	@touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

cover: $(INSTALLED)
	@rm -f .coverage .coverage.*
	$(BIN)/coverage run $(PYTEST) $(ARGS)
	@$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

pytest: $(INSTALLED)
	$(BIN)/python $(PYTEST) $(ARGS)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks $(ARGS)

install: $(INSTALLED)

# A demo needs less than the tests; what has the tests' packages can run the demo, too.
$(DEMO_INSTALLED): pyproject.toml | $(CREATED)
	@test $(INSTALLED) -nt pyproject.toml || $(PIP_INSTALL) '.[demo]'
	@touch $@

$(INSTALLED): pyproject.toml | $(CREATED)
	@$(PIP_INSTALL) '.[dev]'
	@touch $@

$(CREATED):
	@"$(PYTHON)" -c "$(SUPPORTED)" 2>/dev/null || { \
	  echo "tracemw needs Python 3.10 or newer; '$(PYTHON)' is not. Say which one to use: make PYTHON=/path/to/python3"; \
	  exit 1; }
	@echo "Setting up $(VENV) with Python $(VERSION) ..."
	@"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-mlflow build dist demo .coverage .coverage.* htmlcov .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
