# `make` lists the targets. Everything is installed into .venv, nothing outside the checkout.

# The interpreter that creates .venv: make setup PYTHON=python3.11
PYTHON ?= python3

# Only for `make wheelhouse`, PYTHON is the version of the machine the wheels are for.
ifneq ($(filter wheelhouse,$(MAKECMDGOALS)),)
  TARGET := $(patsubst python%,%,$(PYTHON))
  override PYTHON := python3
endif

VENV_PYTHON := .venv/bin/python
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format doctor wheelhouse clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY)  ## create .venv with all packages (about 3 minutes, 6 GB)

$(READY): requirements.txt requirements-dev.txt setup.py \
          tools/setup/setup_env.py tools/setup/install_detectron2.py tools/setup/detectron2_edits.py
	@command -v $(PYTHON) >/dev/null || { \
	  echo "setup: there is no '$(PYTHON)'; name a Python 3.10 or newer: make setup PYTHON=python3.11"; \
	  exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "setup: $$($(PYTHON) --version 2>&1) is too old, 3.10 or newer is needed:" \
	       "make setup PYTHON=python3.11"; \
	  exit 1; } >&2
	@$(PYTHON) tools/setup/setup_env.py

demo: $(READY)  ## run the whole demonstration job
	$(VENV_PYTHON) tools/demo_job.py

test: $(READY)  ## run the tests
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -n 2

lint: $(READY)  ## check style and formatting
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .

format: $(READY)  ## repair style and formatting
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

doctor: $(READY)  ## say what this machine has, what is wrong and how to fix it
	$(VENV_PYTHON) tools/doctor.py

# WITHOUT="opencv-python-headless matplotlib" leaves out large packages
wheelhouse: $(READY)  ## collect wheels for a machine without an index: make wheelhouse PYTHON=3.12
	$(VENV_PYTHON) tools/setup/collect_wheels.py --python "$(TARGET)" $(if $(WITHOUT),--without $(WITHOUT))

clean:  ## remove build outputs and caches
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## remove .venv and the wheelhouse as well
	rm -rf .venv wheelhouse
