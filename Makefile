# make reproduce   install, run notebooks 01 to 07 on the digits, print what was found
# make test        install, lint, test
# make study NAME=vit_mnist   another study of studies/      make notebook   open Jupyter
# make report NAME=vit_mnist  its tables and figures anew from data/results, without running it
# make check-bounds  every bound against exact norms on 400 random networks
# make ladder      train the networks of studies/digits_ladder.yaml, ask every bound there
# make coverage    are the sample sizes enough? pilots against the truth on whole pools
# make check-batches  do studies survive kills, failures, a full disk, each other?
# make html        every notebook as a page of site/        make paper      compile paper/main.tex
# make clean       remove caches, keep results
#
# PIP_ARGS goes to pip, CORES (2) and GPUS (1) limit Snakemake, PYTHON names the interpreter that makes .venv.
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2> /dev/null && echo $$p && break; done)
CORES ?= 2
GPUS ?= 1
PIP_ARGS ?=
NAME ?=
STUDY ?= $(if $(NAME),studies/$(NAME).yaml)

BIN := .venv/bin
SNAKEMAKE := $(BIN)/snakemake --cores $(CORES) --resources gpu=$(GPUS) --nolock --rerun-incomplete --keep-going --quiet rules host reason
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PROGRESS := 2>&1 | $(BIN)/python -m utils.notebooks progress
STEM = $(basename $(notdir $(STUDY)))
REPORT = data/runs/_study_$(STEM)/notebooks
QUICKSTART := studies/quickstart.yaml

.PHONY: help reproduce test check-bounds study report ladder coverage check-batches notebook html paper clean

help:
	@sed -n '1,/^$$/s/^# *//p;/^PYTHON/q' Makefile

.venv/.installed: requirements.txt constraints.txt
	@test -n "$(PYTHON)" || { echo "There is no python3: install Python 3.11." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: give make PYTHON=python3.11.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt -c constraints.txt $(PIP_ARGS)
	@touch $@

reproduce: .venv/.installed
	@$(SNAKEMAKE) --config study=$(QUICKSTART) $(PROGRESS)
	@$(BIN)/python -m utils.notebooks merge $(QUICKSTART)
	@$(BIN)/python -m utils.runs $(QUICKSTART)

report: .venv/.installed
	@test -n "$(STUDY)" || { echo "No study given: type make report NAME=quickstart, or STUDY=PATH.yaml." >&2; exit 1; }
	@mkdir -p $(REPORT)
	@copy=$(REPORT)/.07_study_report.$$$$.ipynb; trap 'rm -f "$$copy"' EXIT; \
	  PYTHONHASHSEED=0 $(BIN)/papermill notebooks/07_study_report.ipynb "$$copy" \
	  -p study $(STEM) -y "runs: []" --cwd . --no-progress-bar && \
	  $(BIN)/python -m utils.notebooks normalise "$$copy" $(REPORT)/07_study_report.ipynb
	@$(BIN)/python -m utils.runs $(STUDY)

study: .venv/.installed
	@test -n "$(STUDY)" || { echo "No study given: type make study NAME=quickstart, or STUDY=PATH.yaml." >&2; exit 1; }
	@$(SNAKEMAKE) --config study=$(STUDY) $(PROGRESS)
	@$(BIN)/python -m utils.runs $(STUDY)

test: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

check-bounds: .venv/.installed
	$(BIN)/python tests/check_bounds.py

ladder: .venv/.installed
	@$(SNAKEMAKE) --config study=studies/digits_ladder.yaml --until notebook_02
	$(BIN)/python tests/check_ladder.py

coverage: .venv/.installed
	$(BIN)/python tests/check_coverage.py

check-batches: .venv/.installed
	$(BIN)/python tests/check_batches.py

notebook: .venv/.installed
	$(BIN)/jupyter lab notebooks

html: .venv/.installed
	$(BIN)/python -m utils.notebooks html site

paper:
	@command -v latexmk > /dev/null || { echo "latexmk is missing: install TeX Live with latexmk (Debian: texlive-latex-extra latexmk)." >&2; exit 1; }
	cd paper && latexmk -pdf -interaction=nonstopmode -halt-on-error -outdir=build main.tex

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis paper/build utils/__pycache__ tests/__pycache__
