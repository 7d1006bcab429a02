# make reproduce   install, run notebooks 01 to 07 on the digits, print what was found
# make check       the fast part of the tests: style, types, examples, tests of less than a second
# make test        install, and all of it: what check does, and the notebooks end to end
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

# These go into command lines: letters, digits and . _ - / alone, or nothing runs. `value` keeps make from
# expanding what was given; `without` is a text less all the words of a list.
LEGAL := a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z
LEGAL += 0 1 2 3 4 5 6 7 8 9 . _ - /
without = $(if $2,$(call without,$(subst $(firstword $2),,$1),$(wordlist 2,$(words $2),$2)),$1)
$(foreach v,NAME CORES GPUS,$(if $(call without,$(value $v),$(LEGAL)),$(error $v is not a plain name: give letters, digits and . _ - /, nothing else)))
$(foreach v,CORES GPUS,$(if $(call without,$(value $v),0 1 2 3 4 5 6 7 8 9),$(error $v is not a whole number: give one from 1 on)))
$(foreach v,CORES GPUS,$(if $(call without,$(value $v),0),,$(error $v is 0 or empty: give a whole number from 1 on)))
$(if $(call without,$(if $(findstring file,$(origin STUDY)),,$(value STUDY)),$(LEGAL)),$(error STUDY is not a plain path: give letters, digits and . _ - /, nothing else))

BIN := .venv/bin
SNAKEMAKE := $(BIN)/snakemake -s workflow/Snakefile --cores $(CORES) --resources gpu=$(GPUS) --nolock --rerun-incomplete \
  --keep-going --quiet rules host reason
SHELL := bash
.SHELLFLAGS := -o pipefail -c
STEM = $(basename $(notdir $(STUDY)))
REPORT = data/runs/_study_$(STEM)/notebooks
QUICKSTART := studies/quickstart.yaml
TESTS := --doctest-modules utils workflow/*.py tests -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help reproduce check test static check-bounds study report ladder coverage check-batches notebook html paper clean

help:
	@sed -n '1,/^$$/s/^# *//p;/^PYTHON/q' Makefile

.venv/.installed: requirements.txt constraints.txt
	@test -n "$(PYTHON)" || { echo "There is no python3: install Python 3.11." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: give make PYTHON=python3.11.")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt -c constraints.txt $(PIP_ARGS)
	@touch $@

reproduce: .venv/.installed
	@$(SNAKEMAKE) --config study=$(QUICKSTART)
	@$(BIN)/python -m workflow merge $(QUICKSTART)
	@$(BIN)/python -m workflow summary $(QUICKSTART)

report: .venv/.installed
	@test -n "$(STUDY)" || { echo "No study given: type make report NAME=quickstart, or STUDY=PATH.yaml." >&2; exit 1; }
	@test -f "$(STUDY)" || { echo "There is no study $(STUDY): write it, or name one of studies/." >&2; exit 1; }
	@mkdir -p $(REPORT)
	@copy=$(REPORT)/.07_study_report.$$$$.ipynb; trap 'rm -f "$$copy"' EXIT; \
	  PYTHONHASHSEED=0 $(BIN)/papermill notebooks/07_study_report.ipynb "$$copy" \
	  -p study $(STEM) -y "runs: []" --cwd . --no-progress-bar --log-level WARNING && \
	  $(BIN)/python -m workflow normalise "$$copy" $(REPORT)/07_study_report.ipynb
	@$(BIN)/python -m workflow summary $(STUDY)

study: .venv/.installed
	@test -n "$(STUDY)" || { echo "No study given: type make study NAME=quickstart, or STUDY=PATH.yaml." >&2; exit 1; }
	@$(SNAKEMAKE) --config study=$(STUDY)
	@$(BIN)/python -m workflow summary $(STUDY)

static: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: static
	$(BIN)/python -m pytest -m "not slow" $(TESTS)

test: static
	$(BIN)/python -m pytest $(TESTS)

check-bounds: .venv/.installed
	$(BIN)/python -m workflow.experiments.bounds

ladder: .venv/.installed
	@$(SNAKEMAKE) --config study=studies/digits_ladder.yaml --until notebook_02
	$(BIN)/python -m workflow.experiments.ladder
	$(BIN)/python -m utils.report.ladder

coverage: .venv/.installed
	$(BIN)/python -m workflow.experiments.coverage

check-batches: .venv/.installed
	$(BIN)/python -m workflow.experiments.batches

notebook: .venv/.installed
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

# The pages' links to other notebooks lead to pages.
html: .venv/.installed
	@for folder in notebooks notebooks/rendered/*; do \
	  $(BIN)/jupyter nbconvert --log-level ERROR --to html --output-dir "site/$${folder#notebooks}" $$folder/*.ipynb || exit 1; \
	done
	@find site -name '*.html' -exec sed -i -E 's|href="([^":/]+)\.ipynb"|href="\1.html"|g' {} +
	@echo "Open site/01_data_preparation.html in a browser."

paper:
	@command -v latexmk > /dev/null || { echo "latexmk is missing: install TeX Live with latexmk (Debian: texlive-latex-extra latexmk)." >&2; exit 1; }
	cd paper && latexmk -pdf -interaction=nonstopmode -halt-on-error -outdir=build main.tex

clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis paper/build
	find utils workflow tests -name __pycache__ -type d -prune -exec rm -rf {} +
