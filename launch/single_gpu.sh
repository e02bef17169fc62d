#!/usr/bin/env bash
# Train on one GPU, or on the CPU if there is no GPU.
#
#   launch/single_gpu.sh recipe.yaml [--field value ...]
#
# GPU=2 selects the third GPU. PYTHON sets the interpreter (default: python).
set -euo pipefail

if [ -n "${GPU-}" ]; then export CUDA_VISIBLE_DEVICES=$GPU; fi
exec "${PYTHON:-python}" -m orpo_dist.cli launch --nodes 1 --processes-per-node 1 "$@"
