# Everything runs from .venv, which is made on first use and brought up to date when pyproject.toml or constraints.txt
# change. Needed beforehand: Python 3.11 or newer with its venv module, git and make.

PYTHON ?= python3
TORCH ?=
JOBS ?= 8
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed

# The stamp holds the TORCH that was asked for; another choice installs anew.
ANEW := $(if $(TORCH),$(if $(filter $(TORCH),$(shell cat $(STAMP) 2>/dev/null)),,anew))

.PHONY: help install demo test quick families schema lint wheel clean constraints anew
.DEFAULT_GOAL := help

help:
	@echo "make install      create .venv; TORCH=cpu, TORCH=default or TORCH=cu130 chooses the build of PyTorch"
	@echo "make demo         run the demo study and write its report (ARGS=... are passed on)"
	@echo "make test         run the tests in at most JOBS=$(JOBS) processes (ARGS=... are passed to pytest)"
	@echo "make quick        run the tests of formulas, requests and arguments, in about 90 s"
	@echo "make families     measure every family and write the tables of docs/families.md"
	@echo "make schema       write docs/study.schema.json, the schema of study files"
	@echo "make lint         ruff and pyright"
	@echo "make wheel        build the wheel into dist/"
	@echo "make clean        remove .venv, caches and builds; results in runs/ stay"
	@echo "make constraints  resolve constraints.txt anew (needs the network)"
	@echo "PYTHON=$(PYTHON) is the interpreter that .venv is made from."

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(ANEW)
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" sh scripts/install.sh

schema: $(STAMP)
	$(BIN)/python -m secateur.study.schema >docs/study.schema.json

demo: $(STAMP)
	$(BIN)/secateur demo $(ARGS)

# One thread in each worker: as many workers as cores would otherwise fight over them. By worksteal each has a run of
# files to itself, and so makes what the tests of a file share only once; whoever is done early takes from the others.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal --maxprocesses $(JOBS) $(ARGS)

# What most changes touch, without what is marked slow.
QUICK := api checkpoint compare completion controls cost depth_methods divergence engine formatting held_out install \
	layout methods progress prune_verb shapes shapes_verb shards spec startup statistics stats surgery target \
	token_loss train train_parts weight_methods width_methods
quick: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal --maxprocesses $(JOBS) -m "not slow" \
		$(QUICK:%=tests/unit/test_%.py) $(ARGS)

families: $(STAMP)
	OMP_NUM_THREADS=1 UPDATE_FAMILIES=1 $(BIN)/pytest -q tests/unit/test_family_proofs.py

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

wheel: $(STAMP)
	$(BIN)/python -m pip --disable-pip-version-check wheel -q --no-deps -w dist .
	@ls dist/secateur-*.whl

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
	find src tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

# Without the CUDA packages: those follow from the build of PyTorch, which scripts/install.sh chooses. Without
# UV_FIND_LINKS: a wheel at hand would leave its local version (+cpu) in the file.
constraints: $(STAMP)
	$(BIN)/pip install -qq uv
	grep '^torch==' constraints.txt > .venv/torch.txt
	env -u UV_FIND_LINKS $(BIN)/uv pip compile -q --universal --python-version 3.11 --upgrade pyproject.toml \
		--extra dev --extra tasks --extra slurm --extra handoff --extra quantisation -c .venv/torch.txt --no-annotate --no-header --no-emit-index-url --no-emit-find-links -o .venv/resolved.txt
	grep -vE '^(nvidia-|cuda-|triton)' .venv/resolved.txt > constraints.txt
