# make demo    tiny model, drawn images, training on two processes, scores: under five minutes on two cores
# make test    the quick tests, under four minutes on two cores (make test-slow: the others, with a real Slurm)
# make lint    ruff and shellcheck
# make clean   remove what the demo made (make distclean: .venv too)
#
# Only python3 (3.11 or newer, another with PYTHON=...) and make have to be there; the rest goes into .venv.

SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
# Two processes on two cores are fastest with one thread each; torch would start two in each.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-slow lint clean distclean
.DELETE_ON_ERROR:

# The stamps make .venv anew exactly when a requirements file changes.
.venv/requirements.stamp: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "Installing requirements.txt into .venv (a minute or two)"
	@rm -rf .venv
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq --no-compile --requirement requirements.txt
	@touch $@

.venv/requirements-dev.stamp: .venv/requirements.stamp requirements-dev.txt requirements-extra.txt
	@echo "Installing requirements-dev.txt into .venv"
	@$(BIN)/pip install -qq --no-compile --requirement requirements-dev.txt
	@touch $@

# Made once. A change of how they are made, or of the config, starts the demo afresh; otherwise `make demo` goes on
# where it was: a stopped training resumes, a finished one is only evaluated again.
demo/raw/metadata.csv: demo.py toy/endoscopy.py toy/tiny_model.py configs/demo.yaml | .venv/requirements.stamp
	@rm -rf demo outputs/demo results/demo results/demo_question_only
	$(BIN)/python demo.py

demo/data/train.json: demo/raw/metadata.csv
	$(BIN)/python prepare_data.py kvasir --source demo/raw --out demo/data

demo: demo/data/train.json | .venv/requirements.stamp
	$(BIN)/torchrun --standalone --nproc_per_node=2 train.py --config configs/demo.yaml
	$(BIN)/python evaluate.py --config configs/demo.yaml
	@$(BIN)/python demo.py --summary

test: .venv/requirements-dev.stamp
	@$(BIN)/python -m pytest -m "not slow and not slurm" --numprocesses auto --maxprocesses 4 --dist worksteal

test-slow: .venv/requirements-dev.stamp
	@$(BIN)/python -m pytest -m "slow or slurm"

lint: .venv/requirements-dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@if command -v shellcheck > /dev/null; then shellcheck --external-sources .ci/run slurm/*.sh slurm/*.slurm; \
		else echo "shellcheck is not installed: the shell scripts were not checked"; fi

clean:
	rm -rf demo outputs/demo results/demo results/demo_question_only .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
