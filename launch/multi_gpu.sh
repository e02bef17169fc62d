#!/usr/bin/env bash
# Train on the GPUs of this machine, with one process per GPU.
#
#   launch/multi_gpu.sh recipe.yaml [--field value ...]
#
# GPUS=4 starts four processes (default: one per visible GPU). CONFIG=zero3 selects an accelerate config (a name from
# accelerate_configs/ or a file; default: chosen from the recipe, see docs/scaling.md). PYTHON sets the interpreter.
set -euo pipefail

options=(--nodes 1)
if [ -n "${GPUS-}" ]; then options+=(--processes-per-node "$GPUS"); fi
if [ -n "${CONFIG-}" ]; then options+=(--accelerate-config "$CONFIG"); fi
exec "${PYTHON:-python}" -m orpo_dist.cli launch "${options[@]}" "$@"
