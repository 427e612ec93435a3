# make lab     the course in JupyterLab, at the first notebook
# make test    everything: tests, notebooks, solved exercises, style, types
# make help    the other targets
#
# Options: PYTHON=python3.12 (which Python to use), PIP_ARGS="..." (passed to pip install), LAB_ARGS="..." (passed to
# jupyter lab), WORKERS=4 (test processes). Works with GNU make 3.81 and newer.

VENV := .venv
EXTRAS := course,tests
PYTHON_IN := $(VENV)/bin/python
WORKERS := 2
# In a container everybody is root, and JupyterLab then wants to be told that this is meant.
ROOT := $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)
NOTEBOOKS := notebooks exercises/solutions
# Several test processes with several threads each would fight for the same cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
SETUP = GOAL="$(firstword $(MAKECMDGOALS))" sh .ci/setup

.DEFAULT_GOAL := help
.PHONY: help setup lab run test style types suite bench course-check readme floor

help:
	@echo "make lab           open the course in JupyterLab (sets everything up the first time)"
	@echo "make run           the quickstart without a browser: train, print a sample, save the figures in runs/quickstart"
	@echo "make test          run every test, notebook and solved exercise, and check style and types"
	@echo "make bench         run the benchmarks (installs the libraries they compare with)"
	@echo "make course-check  execute every notebook afresh and report the time of each"
	@echo "make readme        write the tables in README.md anew from course.toml"
	@echo "make floor         run the tests with the oldest allowed version of every dependency"
	@echo "make style, types, suite    the parts of make test"

setup:
	@$(SETUP) $(VENV) $(EXTRAS) constraints.txt

# PATH, so that `minillm` and `pytest` are found in JupyterLab's own terminals. The root is said, and the notebook given
# as a URL, because the file list would otherwise show notebooks/ only, and the printed address would not lead to it.
lab: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PYTHON_IN) -m jupyter lab --ip=127.0.0.1 $(ROOT) \
		--ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks/00_quickstart.ipynb $(LAB_ARGS)

run: setup
	$(PYTHON_IN) -m minillm train --preset tiny --out runs/quickstart --figures

# Every part is run even when one before it fails; the exit status tells.
test: setup
	@$(MAKE) --keep-going --no-print-directory style types suite

style: setup
	$(PYTHON_IN) -m ruff check .
	$(PYTHON_IN) -m ruff format --check .

types: setup
	$(PYTHON_IN) -m mypy

# loadfile keeps the cells of a notebook together, in one process and one kernel.
suite: setup
	$(ONE_THREAD) $(PYTHON_IN) -m pytest -n $(WORKERS) --dist loadfile --nbval \
		--nbval-sanitize-with notebooks/sanitize.cfg tests $(NOTEBOOKS) $(PYTEST_ARGS)

bench: setup
	@$(SETUP) $(VENV) bench constraints.txt
	@status=0; for script in benchmarks/*.py; do \
		echo "== $$script"; $(PYTHON_IN) $$script || status=1; \
	done; exit $$status

course-check: setup
	$(PYTHON_IN) -m minillm.course check

readme: setup
	$(PYTHON_IN) -m minillm.course readme

# The oldest versions that pyproject.toml allows, in an environment of their own. torch alone is exempt: its oldest
# allowed version has no CPU build on the default index, so the pinned one is used.
floor: setup
	$(PYTHON_IN) .ci/floors.py > .venv-floor.txt
	@$(SETUP) .venv-floor $(EXTRAS) .venv-floor.txt
	$(ONE_THREAD) .venv-floor/bin/python -m pytest -n $(WORKERS) --dist loadfile tests $(PYTEST_ARGS)
