# What a person does on a fresh clone. Needs Python 3.11+, bash and make; everything else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin

# Images of containers like to forbid bytecode; without it every process would compile torch and DeepSpeed anew, 8 seconds of it.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install pretrain pretrain-bert lint test tests clusters long long-tests long-clusters test-all parity verify fuzz slurm gpu bench-prepare bench-step bench-checkpoint clean

help:  ## what there is to do
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: .venv/.installed  ## .venv with megalite in it

# torch first and pinned: left to the other packages' ranges, pip may fetch another build of it.
# --no-compile: bytecode of what is used is made on first import; making all of it takes a third of the installation.
.venv/.installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e .
	touch $@

.venv/.developer: .venv/.installed
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -e '.[dev]'
	touch $@

pretrain: install  ## corpus -> tokenizer -> shards -> a GPT trained on 8 ranks -> a sample
	$(BIN)/megalite prepare stdlib --output data/stdlib-gpt --tokenizer train:bpe --vocab-size 4096
	$(BIN)/megalite train gpt-tiny

pretrain-bert: install  ## the same for BERT
	$(BIN)/megalite prepare stdlib --output data/stdlib-bert --tokenizer train:wordpiece --vocab-size 2048
	$(BIN)/megalite train bert-tiny

lint: .venv/.developer  ## style, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

test: .venv/.developer  ## lint, most tests and some SLURM clusters, beside each other
	$(MAKE) --no-print-directory --jobs 3 lint tests clusters

tests: .venv/.developer
	$(BIN)/python -m pytest -m "not slow and not long and not gpu" --ignore tests/slurm --numprocesses 3 --dist loadfile --no-loadscope-reorder

clusters: .venv/.developer
	$(BIN)/python -m pytest -m "not long" tests/slurm --numprocesses 3 --maxschedchunk 1

long: .venv/.developer  ## what `make test` leaves out for time; CI runs it behind
	$(MAKE) --no-print-directory --jobs 2 long-tests long-clusters

long-tests: .venv/.developer
	$(BIN)/python -m pytest -m "long and not slow and not gpu" --ignore tests/slurm --numprocesses 2 --no-loadscope-reorder

long-clusters: .venv/.developer
	$(BIN)/python -m pytest -m long tests/slurm --numprocesses 3 --maxschedchunk 1

test-all: lint  ## slow tests too: every layout with every model
	$(BIN)/python -m pytest -m "not gpu"

parity: .venv/.developer  ## every mesh x ZeRO x reduction x schedule x model against one process
	$(BIN)/python -m pytest tests/parity/test_layouts.py --numprocesses 2

verify: .venv/.developer  ## `megalite verify` for every recipe on every mesh of the README
	$(BIN)/python -m pytest -m slow tests/ranks/test_verify_recipes.py

bench-step: .venv/.developer  ## step time on CPU ranks, beside plain DeepSpeed
	$(BIN)/python tests/bench_step.py

bench-checkpoint: .venv/.developer  ## saving and loading, beside DeepSpeed
	$(BIN)/python tests/bench_checkpoint.py

fuzz: .venv/.developer  ## 200 layouts drawn at random against one process
	$(BIN)/python tests/parity/test_fuzz.py --first 0 --draws 200

slurm: .venv/.developer  ## everything on SLURM clusters of five nodes on this machine (root; slurmctld slurmd slurm-client munge iproute2)
	$(BIN)/python -m pytest tests/slurm --numprocesses 3 --maxschedchunk 1

gpu: .venv/.developer  ## what needs a GPU
	$(BIN)/python -m pytest -m gpu tests/gpu

bench-prepare: .venv/.developer  ## MB per CPU-second of `megalite prepare`
	$(BIN)/python tests/bench_prepare.py

clean:  ## forget .venv and what runs wrote
	rm -rf .venv data runs build dist *.egg-info
