#!/usr/bin/env bash
# Train on several nodes without SLURM: run this on every node, over ssh or with any scheduler.
#
#   NODES=2 NODE_RANK=0 HEAD=10.0.0.1 PORT=29500 launch/multi_node.sh recipe.yaml [--field value ...]
#   launch/multi_node.sh --nodes 2 --node-rank 1 --head-address 10.0.0.1 --port 29500 recipe.yaml [--field value ...]
#
# What is not set is taken from the variables of the scheduler: PBS, LSF, MPI, Kubernetes, PyTorchJob, srun, or NNODES,
# MASTER_ADDR and MASTER_PORT (docs/clusters.md). All nodes need the same versions, the same recipe and a shared
# output_dir; the nodes compare these before they start and report differences. GPUS and CONFIG work as in multi_gpu.sh.
# Set NCCL_SOCKET_IFNAME (GPUs) or GLOO_SOCKET_IFNAME (CPU) if the wrong network interface is chosen.
set -euo pipefail

options=()
if [ -n "${NODES-}" ]; then options+=(--nodes "$NODES"); fi
if [ -n "${NODE_RANK-}" ]; then options+=(--node-rank "$NODE_RANK"); fi
if [ -n "${HEAD-}" ]; then options+=(--head-address "$HEAD"); fi
if [ -n "${PORT-}" ]; then options+=(--port "$PORT"); fi
if [ -n "${GPUS-}" ]; then options+=(--processes-per-node "$GPUS"); fi
if [ -n "${CONFIG-}" ]; then options+=(--accelerate-config "$CONFIG"); fi
# Before bash 4.4 an empty array is unbound.
exec "${PYTHON:-python}" -m orpo_dist.cli launch ${options[@]+"${options[@]}"} "$@"
