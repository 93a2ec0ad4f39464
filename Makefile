# `make demo` and `make test` each work alone from a bare clone; everything is installed into .venv the first time.
#
#   make demo          pictures from the bundled model, then a small model trained before your eyes (about 4 minutes)
#   make test          the test suite, without the slow tests
#   make test-slow     the slow tests alone
#   make lint          ruff check, ruff format --check, mypy
#   make bench         every performance claim, measured here
#   make recipes       a few steps of every shipped recipe
#   make clean         removes build products and demo-output (not runs/)
#
# Variables: PYTHON=/path/to/python3.11   TORCH_INDEX=URL (where another torch build is)
#            PROMPT="man scientist"         (make demo: your own prompt)
#            WORKERS=2                      (make test: processes, each of one thread)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_INDEX ?=
PYTHON ?=
PROMPT ?=
WORKERS ?= 2
DEMO := demo-output

.PHONY: help install demo test test-slow lint format bench recipes clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

install: $(STAMP)

# A name on PATH proves nothing (version managers leave shims that only print an error), so each candidate is run.
$(VENV)/bin/python:
	@for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3 python3.14 python /usr/bin/python3; do \
	    if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	        echo "Creating $(VENV) with $$("$$candidate" --version) ($$candidate)"; \
	        "$$candidate" -m venv --clear $(VENV); \
	        exit 0; \
	    fi; \
	done; \
	echo "No Python >= 3.11 with venv was found; install one (Debian: apt-get install python3-venv) or say PYTHON=/path/to/python3" >&2; \
	exit 2

# Torch first, because the same version exists in several builds: the plain wheel for Linux brings some gigabytes of CUDA
# libraries. Without an NVIDIA driver the CPU build is taken where pip finds one (TORCH_INDEX says where to look), else
# whatever build the version has. torch-fidelity and clean-fid are what the tests compare scores with: their arithmetic
# alone is used, and torchvision, which both ask for to read pictures, has no CPU build of every version.
$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	@pip_install() { $(BIN)/python -m pip install -qq --disable-pip-version-check "$$@"; }; \
	if $(BIN)/python -c 'import sys, importlib.metadata as m; sys.exit(m.version("torch").split("+")[0] != "$(TORCH)")' 2>/dev/null; then \
	    :; \
	elif [ -n "$(TORCH_INDEX)" ]; then \
	    echo "Installing torch $(TORCH) from TORCH_INDEX ..."; \
	    pip_install torch==$(TORCH) --extra-index-url "$(TORCH_INDEX)"; \
	elif [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1; then \
	    echo "Installing torch $(TORCH), CPU build ..."; \
	    pip_install "torch==$(TORCH)+cpu" 2>/dev/null \
	        || pip_install torch==$(TORCH); \
	else \
	    echo "Installing torch $(TORCH) ..."; \
	    pip_install torch==$(TORCH); \
	fi; \
	echo "Installing Darkroom and its development tools ..."; \
	pip_install -c constraints.txt -e '.[dev]'; \
	pip_install -c constraints.txt --no-deps torch-fidelity clean-fid
	@touch $@

demo: $(STAMP)
	@mkdir -p $(DEMO)
	@if $(BIN)/python -c 'import darkroom, sys; sys.exit("emoji" not in darkroom.bundled())'; then \
	    echo "== 1/2  pictures from the bundled model: darkroom generate -m emoji PROMPT"; \
	    if [ -n "$(PROMPT)" ]; then set -- "$(PROMPT)"; \
	    else set -- "pilot" "man scientist" "woman teacher" "grinning face" "flag: Singapore" "keycap: 5"; fi; \
	    for prompt in "$$@"; do \
	        $(BIN)/darkroom generate -m emoji "$$prompt" --seed 0 -o "$(DEMO)/$${prompt//[^A-Za-z0-9]/-}.png"; \
	    done; \
	else \
	    echo "== 1/2  no bundled model in this copy: pictures come from the model trained next"; \
	fi
	@echo "== 2/2  a small model, trained from nothing: darkroom train shapes-demo"
	@rm -rf $(DEMO)/shapes
	@$(BIN)/darkroom train shapes-demo --output $(DEMO)/shapes
	@echo
	@echo "Pictures:  $(DEMO)/"
	@echo "Report:    $(DEMO)/shapes/report.html   (open it in a browser)"
	@echo "Next:      $(BIN)/darkroom generate -m $(DEMO)/shapes/model \"a red circle\" -o red-circle.png"

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -m slow

# All three run, so that one visit shows everything there is to mend.
lint: $(STAMP)
	@status=0; $(BIN)/ruff check . || status=1; $(BIN)/ruff format --check . || status=1; \
	$(BIN)/mypy || status=1; exit $$status

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP)
	@status=0; for file in benchmarks/*.py; do echo "== $$file"; $(BIN)/python "$$file" || status=1; done; exit $$status

# A recipe whose data is not on this machine says so and the next one follows.
recipes: $(STAMP)
	@$(BIN)/python tools/run_recipes.py

clean:
	rm -rf build dist $(DEMO) .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "$(VENV) and runs/ are kept; remove them by hand for a bare clone."
